//! Starting, watching, stopping and removing containers; and finding them again after a restart.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skep_api::{Timestamp, with_causes};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::Command;
use tokio::sync::watch;

use super::{Container, Engine, EngineError, Record, disk_error, now};
use crate::container::config::{ContainerConfig, FileMount, JoinedNetwork, MountSource, NetworkMode, PublishedPort};
use crate::container::health::{HealthMonitor, HealthStatus};
use crate::container::rootfs::ContainerDirs;
use crate::container::seccomp::Profile;
use crate::container::shim::{ExecConfig, ShimAnswer, ShimConfig};
use crate::container::spec::{self, Place};
use crate::container::state::{ContainerState, Exit, ExitRecord, Running};
use crate::container::user;
use crate::network::{Joining, NetworkKeeper};
use crate::{disk, sys};

/// How long a container may take to be made.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a killed container may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long the removal of a container waits for those who read its output.
const READERS_LIMIT: Duration = Duration::from_secs(5);
const READERS_PAUSE: Duration = Duration::from_millis(5);
/// What is kept of a check's output.
const PROBE_OUTPUT_MAX: u64 = 4096;
/// The exit code when it was lost: the host was cut off.
const CODE_LOST: i32 = 255;

impl Engine {
    /// Starts a container; returns once its first process runs.
    pub async fn start(self: &Arc<Self>, name: &str) -> Result<(), EngineError> {
        let container = self.find(name)?;
        let one = container.operation.lock().await;
        if matches!(*container.state.borrow(), ContainerState::Running(_)) {
            return Ok(());
        }
        match self.launch(&container).await {
            Ok(running) => {
                container.state.send_replace(ContainerState::Running(running));
                container.save().map_err(disk_error(format!("saving container {}", container.id)))?;
                self.tell_container(&container, "start", &[]);
                self.supervise(container.clone());
                Ok(())
            }
            Err(error) => {
                self.clean_up(&container).await;
                let reason = with_causes(&error);
                let code = if reason.contains("not found") || reason.contains("No such file") { 127 } else { 126 };
                let reason = match (code, container.config.command().first()) {
                    // Clients look for these words.
                    (127, Some(program)) => format!("exec: {program:?}: executable file not found in $PATH ({reason})"),
                    _ => reason,
                };
                container.state.send_replace(ContainerState::Exited(Exit {
                    code,
                    started_at: Timestamp::NEVER,
                    finished_at: now(),
                    oom_killed: false,
                    error: reason.clone(),
                }));
                // The reason for the failed start is what the caller needs to hear.
                let _ = container.save();
                drop(one);
                self.remove_if_asked(&container).await;
                Err(EngineError::Start { id: container.id.clone(), reason })
            }
        }
    }

    async fn launch(&self, container: &Arc<Container>) -> io::Result<Running> {
        let config = &container.config;
        let Connected { address, through, ports } = self.connect(container).await?;
        let layers: Vec<PathBuf> = container.layers.iter().map(|layer| self.images.layer_dir(layer)).collect();
        let shim = self.shim_config(container)?;
        let prepared = {
            let (container, shim) = (container.clone(), shim_json(&shim)?);
            let netns = (config.network != NetworkMode::Host).then(|| self.bridge.netns_path(&container.id));
            let cgroup = self.cgroup(&container.id);
            let init = self.config.data_dir.join("bin/skep-init");
            let volumes = self.volume_dirs(&container);
            move || prepare(&container, &layers, address, &Outside { netns, cgroup, init, volumes, shim })
        };
        tokio::task::spawn_blocking(prepared).await.map_err(io::Error::other)??;
        let started_at = now();
        let (shim_pid, pid) = self.spawn_shim(&container.dirs.data).await?;
        let health = if config.health.is_some() { HealthStatus::Starting } else { HealthStatus::None };
        Ok(Running {
            pid,
            shim_pid,
            shim_start_ticks: start_ticks(shim_pid).unwrap_or(0),
            started_at,
            address,
            through,
            ports,
            health,
        })
    }

    /// Gives a container what it is to see of networks.
    async fn connect(&self, container: &Container) -> io::Result<Connected> {
        let (id, config) = (&container.id, &container.config);
        let alone = |ports| Connected { address: Ipv4Addr::LOCALHOST, through: None, ports };
        match &config.network {
            NetworkMode::Bridge => {
                let (address, ports) = self.bridge.connect(id, &config.ports).await?;
                Ok(Connected { address, through: None, ports })
            }
            NetworkMode::Host => Ok(alone(Vec::new())),
            NetworkMode::None => self.bridge.isolate(id).await.map(|()| alone(Vec::new())),
            NetworkMode::Joined(networks) => {
                let keeper = self.network_keeper().ok_or_else(|| io::Error::other("this host is in no swarm"))?;
                let ports = self.bridge.prepare(id, &config.ports).await?;
                let through = keeper.join(id, self.joining(container, networks, ports.clone())).await?;
                self.bridge.lead(id, through).await?;
                let address = networks.first().map_or(Ipv4Addr::LOCALHOST, |network| network.address);
                Ok(Connected { address, through: Some(through), ports })
            }
        }
    }

    fn joining(&self, container: &Container, networks: &[JoinedNetwork], ports: Vec<PublishedPort>) -> Joining {
        let netns = self.bridge.netns_path(&container.id);
        Joining { netns, networks: networks.to_vec(), ports, resolvers: container.config.dns.clone() }
    }

    /// Names who keeps the networks that are not this host's alone, and tells it of the containers
    /// that are in them already.
    pub fn set_network_keeper(&self, keeper: Option<Arc<dyn NetworkKeeper>>) {
        if let Some(keeper) = &keeper {
            for container in self.lock().values() {
                if let NetworkMode::Joined(networks) = &container.config.network
                    && let ContainerState::Running(running) = &*container.state.borrow()
                {
                    keeper.adopt(&container.id, self.joining(container, networks, running.ports.clone()));
                }
            }
        }
        *self.keeper.lock().expect("nobody panics while holding it") = keeper;
    }

    fn network_keeper(&self) -> Option<Arc<dyn NetworkKeeper>> {
        self.keeper.lock().expect("nobody panics while holding it").clone()
    }

    /// The compiled system-call filter of a container that takes one.
    fn filter(&self, config: &ContainerConfig) -> io::Result<Option<PathBuf>> {
        let profile = config.has_compiled_filter().then(|| Profile::new(&spec::capabilities(config)));
        profile.map(|profile| profile.ensure_compiled(&self.config.run_dir.join("seccomp"))).transpose()
    }

    fn shim_config(&self, container: &Container) -> io::Result<ShimConfig> {
        let cgroup = self.cgroup(&container.id);
        let relative = cgroup.strip_prefix("/").unwrap_or(&cgroup);
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let oom_file = if v1.exists() {
            v1.join(relative).join("memory.oom_control")
        } else {
            Path::new("/sys/fs/cgroup").join(relative).join("memory.events")
        };
        Ok(ShimConfig {
            id: container.id.clone(),
            root: self.config.run_dir.join("state"),
            bundle: container.dirs.data.clone(),
            log: container.config.log.clone(),
            log_path: container.dirs.log(),
            filter: self.filter(&container.config)?,
            oom_file,
        })
    }

    fn cgroup(&self, id: &str) -> PathBuf {
        Path::new(&self.config.cgroup_parent).join(id)
    }

    fn volume_dirs(&self, container: &Container) -> BTreeMap<String, PathBuf> {
        let names = container.config.mounts.iter().filter_map(|mount| match &mount.source {
            MountSource::Volume { name, .. } => Some(name),
            MountSource::Bind { .. } | MountSource::Tmpfs { .. } => None,
        });
        names.map(|name| (name.clone(), self.volumes.data_dir(name))).collect()
    }

    /// Runs the shim and waits for its answer: its pid and the container's.
    async fn spawn_shim(&self, dir: &Path) -> io::Result<(i32, i32)> {
        fs::create_dir_all(self.config.run_dir.join("state"))?;
        let mut child = Command::new(&self.config.program)
            .arg("shim")
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()?;
        let shim_pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
        let stdout = child.stdout.take().ok_or_else(|| io::Error::other("the shim has no output"))?;
        // The shim lives on; it is only waited for so that it leaves no zombie.
        self.tasks.spawn(async move { drop(child.wait().await) });
        let mut line = String::new();
        let mut reader = BufReader::new(stdout);
        tokio::time::timeout(START_LIMIT, reader.read_line(&mut line)).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("the shim said nothing in {START_LIMIT:?}"))
        })??;
        match serde_json::from_str(&line) {
            Ok(ShimAnswer::Started { pid }) => Ok((shim_pid, pid)),
            Ok(ShimAnswer::Failed { reason }) => Err(io::Error::other(reason)),
            Err(_) => Err(io::Error::other("the shim ended without an answer")),
        }
    }

    /// Waits for the container's end, and asks for its health meanwhile.
    fn supervise(self: &Arc<Self>, container: Arc<Container>) {
        let engine = Arc::clone(self);
        self.tasks.spawn(async move {
            let running = match &*container.state.borrow() {
                ContainerState::Running(running) => running.clone(),
                ContainerState::Created | ContainerState::Exited(_) => return,
            };
            let ended = wait_process(running.shim_pid);
            let probes = engine.clone().probe(container.clone(), running.health);
            tokio::select! {
                () = ended => {}
                () = probes => unreachable!("probing goes on until the end"),
            }
            let exit = read_exit(&container.dirs, running.started_at);
            engine.clean_up(&container).await;
            let code = exit.code;
            container.state.send_replace(ContainerState::Exited(exit));
            if let Err(error) = container.save() {
                tracing::error!(container = %container.id, %error, "a container's end could not be saved");
            }
            engine.tell_container(&container, "die", &[("exitCode", code.to_string())]);
            engine.remove_if_asked(&container).await;
        });
    }

    /// Removes a container that was to be gone once it has ended, and once those who read its output
    /// have all of it.
    async fn remove_if_asked(&self, container: &Container) {
        let deadline = Instant::now() + READERS_LIMIT;
        while container.config.auto_remove && Arc::strong_count(&container.readers) > 1 && Instant::now() < deadline {
            tokio::time::sleep(READERS_PAUSE).await;
        }
        if container.config.auto_remove
            && let Err(error) = self.remove(&container.id, false).await
        {
            tracing::warn!(container = %container.id, %error, "a container was not removed at its end");
        }
    }

    /// Runs the health check again and again; never ends by itself.
    async fn probe(self: Arc<Self>, container: Arc<Container>, status: HealthStatus) {
        let Some(check) = container.config.health.clone() else { return std::future::pending().await };
        let mut monitor = HealthMonitor::new(check.clone(), status, Instant::now());
        loop {
            tokio::time::sleep(monitor.pause(Instant::now())).await;
            let passed = match self.exec(&container.id, &check.command, check.timeout).await {
                Ok((code, _)) => code == 0,
                Err(error) => {
                    tracing::debug!(container = %container.id, %error, "a health check could not run");
                    false
                }
            };
            let before = monitor.status();
            monitor.handle_result(passed, Instant::now());
            if monitor.status() != before {
                container.state.send_modify(|state| {
                    if let ContainerState::Running(running) = state {
                        running.health = monitor.status();
                    }
                });
                // Lost at worst until the next change.
                let _ = container.save();
                self.tell_container(&container, &format!("health_status: {}", monitor.status().as_str()), &[]);
            }
        }
    }

    /// Runs a command in a running container; returns its exit code and the start of its output.
    pub async fn exec(&self, name: &str, command: &[String], limit: Duration) -> Result<(i32, String), EngineError> {
        let container = self.find(name)?;
        if !matches!(*container.state.borrow(), ContainerState::Running(_)) {
            let found = container.state.borrow().as_str();
            return Err(EngineError::WrongState { id: container.id.clone(), found, wanted: "running" });
        }
        let doing = || disk_error(format!("running a command in container {}", container.id));
        let number = rand::random::<u64>();
        let file = |what: &str| container.dirs.run.join(format!("exec-{number:016x}-{what}.json"));
        let (process_path, exec_path) = (file("process"), file("config"));
        let config = ExecConfig {
            id: container.id.clone(),
            root: self.config.run_dir.join("state"),
            process_path: process_path.clone(),
            filter: self.filter(&container.config).map_err(doing())?,
            limit,
        };
        let spec: serde_json::Value =
            serde_json::from_slice(&fs::read(container.dirs.data.join("config.json")).map_err(doing())?)
                .map_err(io::Error::other)
                .map_err(doing())?;
        let mut process = spec["process"].clone();
        process["args"] = command.into();
        disk::write_whole(&process_path, process.to_string().as_bytes()).map_err(doing())?;
        disk::write_whole(&exec_path, &serde_json::to_vec(&config).map_err(io::Error::other).map_err(doing())?)
            .map_err(doing())?;
        let result = self.run_exec(&exec_path, limit).await.map_err(doing());
        for path in [process_path, exec_path] {
            // They are gone with the container at the latest.
            let _ = fs::remove_file(path);
        }
        result
    }

    async fn run_exec(&self, path: &Path, limit: Duration) -> io::Result<(i32, String)> {
        let mut child = Command::new(&self.config.program)
            .arg("shim-exec")
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let mut output = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            let read = stdout.take(PROBE_OUTPUT_MAX).read_to_end(&mut output).await;
            read?;
        }
        // The command's own limit is kept by the process that runs it.
        let status = tokio::time::timeout(limit + KILL_LIMIT, child.wait())
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the command did not end"))??;
        Ok((status.code().unwrap_or(CODE_LOST), String::from_utf8_lossy(&output).into_owned()))
    }

    /// Takes down what a running container needs; what fails is told and goes on.
    async fn clean_up(&self, container: &Container) {
        let (root, id, dirs) = (self.config.run_dir.join("state"), container.id.clone(), container.dirs.clone());
        let result = tokio::task::spawn_blocking(move || {
            let state = root.join(&id);
            let deleted = if state.exists() {
                libcontainer::container::Container::load(state)
                    .and_then(|mut container| container.delete(true))
                    .map_err(io::Error::other)
            } else {
                Ok(())
            };
            let unmounted = dirs.unmount();
            deleted.and(unmounted)
        });
        if let Err(error) = result.await.map_err(io::Error::other).flatten() {
            tracing::warn!(container = %container.id, %error, "a container left something behind");
        }
        if let Some(keeper) = self.network_keeper()
            && let Err(error) = keeper.leave(&container.id).await
        {
            tracing::warn!(container = %container.id, %error, "a container was not taken off its networks");
        }
        if let Err(error) = self.bridge.disconnect(&container.id).await {
            tracing::warn!(container = %container.id, %error, "a container's network was not taken down");
        }
    }

    /// Asks a container to stop; kills it after `grace`.
    pub async fn stop(&self, name: &str, grace: Duration) -> Result<Exit, EngineError> {
        let container = self.find(name)?;
        let signal = if container.config.stop_signal.is_empty() { "SIGTERM" } else { &container.config.stop_signal };
        if let ContainerState::Exited(exit) = &*container.state.borrow() {
            return Ok(exit.clone());
        }
        self.kill(name, signal)?;
        if let Ok(exit) = tokio::time::timeout(grace, self.wait(name)).await {
            return exit;
        }
        self.kill(name, "SIGKILL")?;
        tokio::time::timeout(KILL_LIMIT, self.wait(name)).await.unwrap_or_else(|_| {
            Err(EngineError::WrongState { id: container.id.clone(), found: "running", wanted: "killed" })
        })
    }

    /// Sends a signal, by name or number, to a container's first process.
    pub fn kill(&self, name: &str, signal: &str) -> Result<(), EngineError> {
        let container = self.find(name)?;
        let number = parse_signal(signal).ok_or_else(|| EngineError::Signal(signal.to_owned()))?;
        let running = match &*container.state.borrow() {
            ContainerState::Running(running) => running.clone(),
            other @ (ContainerState::Created | ContainerState::Exited(_)) => {
                return Err(EngineError::WrongState {
                    id: container.id.clone(),
                    found: other.as_str(),
                    wanted: "running",
                });
            }
        };
        let sent = sys::pidfd_open(running.pid).and_then(|pidfd| {
            // The number may be another's by now; only the shim's child is meant.
            if parent_pid(running.pid) == Some(running.shim_pid) { sys::pidfd_signal(&pidfd, number) } else { Ok(()) }
        });
        match sent {
            // It has just ended.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other.map_err(disk_error(format!("signalling container {}", container.id))),
        }
    }

    /// Removes a container and its anonymous volumes; `force` kills it first.
    pub async fn remove(&self, name: &str, force: bool) -> Result<(), EngineError> {
        let container = self.find(name)?;
        if matches!(*container.state.borrow(), ContainerState::Running(_)) {
            if !force {
                return Err(EngineError::WrongState { id: container.id.clone(), found: "running", wanted: "stopped" });
            }
            self.kill(&container.id, "SIGKILL")?;
            drop(tokio::time::timeout(KILL_LIMIT, self.wait(&container.id)).await);
        }
        let _one = container.operation.lock().await;
        self.clean_up(&container).await;
        let dirs = container.dirs.clone();
        tokio::task::spawn_blocking(move || dirs.remove())
            .await
            .map_err(io::Error::other)
            .flatten()
            .map_err(disk_error(format!("removing container {}", container.id)))?;
        self.lock().remove(&container.id);
        self.tell_container(&container, "destroy", &[]);
        Ok(())
    }

    /// Takes up the containers on disk.
    pub(super) fn adopt_all(self: &Arc<Self>) -> Result<(), EngineError> {
        let dir = self.config.data_dir.join("containers");
        for entry in fs::read_dir(&dir).map_err(disk_error("reading the containers"))?.flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            match fs::read(entry.path().join("container.json")).map(|bytes| serde_json::from_slice::<Record>(&bytes)) {
                Ok(Ok(record)) => self.adopt(id, record),
                Ok(Err(error)) => tracing::error!(container = %id, %error, "a container's record is damaged"),
                // It was being created when the daemon died; nobody was told of it.
                Err(_) => drop(self.dirs(&id).remove()),
            }
        }
        Ok(())
    }

    fn adopt(self: &Arc<Self>, id: String, record: Record) {
        let dirs = self.dirs(&id);
        let container = Arc::new(Container {
            id: id.clone(),
            config: Arc::new(record.config),
            layers: record.layers,
            created: record.created,
            dirs,
            state: watch::channel(record.state.clone()).0,
            operation: tokio::sync::Mutex::default(),
            readers: Arc::default(),
        });
        self.lock().insert(id.clone(), container.clone());
        if let ContainerState::Running(running) = record.state {
            self.bridge.adopt(&id, running.address, running.through, running.ports.clone());
            let alive = start_ticks(running.shim_pid) == Some(running.shim_start_ticks);
            if !alive {
                // Supervision finds it gone at once and reads what the shim left.
                container.state.send_modify(|state| {
                    if let ContainerState::Running(running) = state {
                        running.shim_pid = 0;
                    }
                });
            }
            self.supervise(container);
        } else if matches!(record.state, ContainerState::Exited(_)) {
            // The daemon died between its end and its removal.
            let engine = Arc::clone(self);
            self.tasks.spawn(async move { engine.remove_if_asked(&container).await });
        }
    }
}

/// What a container has of networks once it is connected.
struct Connected {
    address: Ipv4Addr,
    through: Option<Ipv4Addr>,
    ports: Vec<PublishedPort>,
}

/// What a container needs from outside its own directories.
struct Outside {
    /// None: the host's.
    netns: Option<PathBuf>,
    cgroup: PathBuf,
    init: PathBuf,
    volumes: BTreeMap<String, PathBuf>,
    shim: Vec<u8>,
}

fn shim_json(config: &ShimConfig) -> io::Result<Vec<u8>> {
    Ok(serde_json::to_vec(config)?)
}

/// Puts everything in place on disk that the shim reads.
fn prepare(container: &Container, layers: &[PathBuf], address: Ipv4Addr, outside: &Outside) -> io::Result<()> {
    let (config, dirs) = (&container.config, &container.dirs);
    fs::create_dir_all(&dirs.run)?;
    fs::set_permissions(&dirs.data, fs::Permissions::from_mode(0o710))?;
    dirs.mount_root(layers)?;
    let user = user::resolve(&dirs.rootfs(), &config.user, &config.groups).map_err(io::Error::other)?;
    let mut files = dirs.write_etc(config, address)?;
    files.extend(dirs.write_payloads(&config.payloads)?);
    if config.init {
        files.push(FileMount { source: outside.init.clone(), target: "/sbin/skep-init".into(), read_only: true });
    }
    let place = Place {
        rootfs: &dirs.rootfs(),
        netns: outside.netns.as_deref(),
        cgroup: &outside.cgroup,
        files: &files,
        volumes: &outside.volumes,
        user: &user,
    };
    if config.command().is_empty() {
        return Err(io::Error::other("no command is given, and the image names none"));
    }
    let spec = spec::build(config, &place);
    disk::write_whole(&dirs.data.join("config.json"), spec.to_string().as_bytes())?;
    disk::write_whole(&dirs.data.join("shim.json"), &outside.shim)?;
    match fs::remove_file(dirs.data.join("exit.json")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Waits for a process that need not be a child; returns at once if it is gone.
async fn wait_process(pid: i32) {
    if pid == 0 {
        return;
    }
    let Ok(pidfd) = sys::pidfd_open(pid) else { return };
    match sys::watch_fd(pidfd) {
        Ok(ended) => drop(ended.readable().await),
        Err(error) => tracing::error!(pid, %error, "a shim cannot be watched"),
    }
}

fn read_exit(dirs: &ContainerDirs, started_at: Timestamp) -> Exit {
    let record =
        fs::read(dirs.data.join("exit.json")).ok().and_then(|bytes| serde_json::from_slice::<ExitRecord>(&bytes).ok());
    match record {
        Some(record) => Exit {
            code: record.code,
            started_at,
            finished_at: Timestamp::from_nanos(record.at_nanos),
            oom_killed: record.oom_killed,
            error: String::new(),
        },
        None => Exit {
            code: CODE_LOST,
            started_at,
            finished_at: now(),
            oom_killed: false,
            error: "the exit code is lost: the host or the shim was killed".into(),
        },
    }
}

/// When a process started, in ticks since the host's start; `None` if it is gone or a zombie.
fn start_ticks(pid: i32) -> Option<u64> {
    let fields = stat_fields(pid)?;
    (fields.first()? != "Z").then(|| fields.get(19)?.parse().ok()).flatten()
}

fn parent_pid(pid: i32) -> Option<i32> {
    stat_fields(pid)?.get(1)?.parse().ok()
}

/// The fields of /proc/PID/stat from the third on; the name before them may hold anything.
fn stat_fields(pid: i32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

fn parse_signal(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    name.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
}
