//! Starting, watching, stopping and removing containers; and finding them again after a restart.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use skep_api::{Timestamp, with_causes};

use super::launch::RuntimeFailure;
use super::{Container, Engine, EngineError, Record, disk_error, now};
use crate::build::BUILD_IMAGE;
use crate::container::config::{ContainerConfig, NetworkMode};
use crate::container::health::{HealthMonitor, HealthStatus};
use crate::container::restart;
use crate::container::rootfs::ContainerDirs;
use crate::container::runtime::Runner;
use crate::container::state::{ContainerState, Exit, ExitRecord, Running};
use crate::network::{DEFAULT_NETWORK, Endpoint};
use crate::sys;

/// How long a killed container may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Between the stop signal and SIGKILL, if nobody says.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long the removal of a container waits for those who read its output.
const READERS_LIMIT: Duration = Duration::from_secs(5);
const READERS_PAUSE: Duration = Duration::from_millis(5);
/// What is kept of a check's output.
const PROBE_OUTPUT_MAX: usize = 4096;
/// The exit code when it was lost: the host was cut off.
const CODE_LOST: i32 = 255;
/// The exit code of a container whose start failed before its program was looked for, as Docker tells it.
const CODE_NOT_TRIED: i32 = 128;
/// How often a container is ended that is started again and again while it is to be removed.
const REMOVE_TRIES: u32 = 5;
/// The code of what SIGKILL has ended.
const KILLED: i32 = 137;

/// How a container is removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemoveOptions {
    /// Kill it first if it runs.
    pub force: bool,
    /// Its nameless volumes go with it.
    pub volumes: bool,
}

impl Engine {
    /// Starts a container; returns once its first process runs.
    pub async fn start(self: &Arc<Self>, name: &str) -> Result<(), EngineError> {
        let container = self.find(name)?;
        container.stopped_by_hand.store(false, Ordering::Relaxed);
        *container.backoff.lock().expect("nobody panics while holding it") = restart::RestartBackoff::default();
        self.start_unless_running(&container).await
    }

    /// Stops a container, if it runs, and starts it: also one that is removed when it has ended.
    pub async fn restart(
        self: &Arc<Self>,
        name: &str,
        signal: Option<&str>,
        grace: Option<Duration>,
    ) -> Result<(), EngineError> {
        let container = self.find(name)?;
        container.restarting_by_hand.store(true, Ordering::Relaxed);
        let at_rest = matches!(*container.state.borrow(), ContainerState::Exited(_) | ContainerState::Created);
        let stopped = if at_rest { Ok(()) } else { self.stop_with(&container.id, signal, grace).await.map(drop) };
        container.restarting_by_hand.store(false, Ordering::Relaxed);
        stopped?;
        self.start(&container.id).await?;
        self.tell_container(&container, "restart", &[]);
        Ok(())
    }

    async fn start_unless_running(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), EngineError> {
        let one = container.operation.lock().await;
        if matches!(*container.state.borrow(), ContainerState::Running(_)) {
            return Ok(());
        }
        match self.launch(container).await {
            Ok(running) => {
                container.ended.store(false, Ordering::SeqCst);
                container.state.send_replace(ContainerState::Running(running));
                self.supervise(container.clone());
                self.refresh_links(container);
                self.tell_places("connect", container);
                self.tell_volumes("mount", container);
                self.tell_container(container, "start", &[]);
                if let Err(error) = container.save_state() {
                    // A daemon that comes back would not know of it: it must not run.
                    drop(self.kill(&container.id, "SIGKILL"));
                    return Err(disk_error(format!("saving container {}", container.id))(error));
                }
                Ok(())
            }
            Err(error) => {
                self.clean_up(container).await;
                container.waiting.lock().expect("nobody panics while holding it").clear();
                let (code, reason) = start_failure(&error, container.config().command().first());
                container.state.send_replace(ContainerState::Exited(Exit {
                    code,
                    started_at: Timestamp::NEVER,
                    finished_at: now(),
                    oom_killed: false,
                    error: reason.clone(),
                }));
                // The reason for the failed start is what the caller needs to hear.
                let _ = container.save_state();
                drop(one);
                self.remove_if_asked(container).await;
                Err(EngineError::Start { id: container.id.clone(), reason })
            }
        }
    }

    /// Waits for the container's end, and asks for its health meanwhile.
    fn supervise(self: &Arc<Self>, container: Arc<Container>) {
        let engine = Arc::clone(self);
        self.tasks.spawn(async move {
            let running = match &*container.state.borrow() {
                ContainerState::Running(running) => running.clone(),
                ContainerState::Created | ContainerState::Restarting(_) | ContainerState::Exited(_) => return,
            };
            let ended = wait_process(running.shim_pid);
            let probes = engine.clone().probe(container.clone(), running.health);
            tokio::select! {
                () = ended => {}
                () = probes => unreachable!("probing goes on until the end"),
            }
            let exit = read_exit(&container.dirs, running.started_at);
            container.ended.store(true, Ordering::SeqCst);
            engine.execs.forget_unstarted(&container.id);
            engine.clean_up(&container).await;
            engine.tell_places("disconnect", &container);
            engine.tell_volumes("unmount", &container);
            engine.handle_exit(&container, exit).await;
        });
    }

    /// Brings a container that has ended to its next state: ended for good, or started once more.
    async fn handle_exit(self: &Arc<Self>, container: &Arc<Container>, exit: Exit) {
        let code = exit.code;
        let delay = if container.stopped_by_hand.load(Ordering::Relaxed) {
            None
        } else {
            let never_ran = exit.started_at == Timestamp::NEVER;
            let ran = if never_ran { Duration::ZERO } else { exit.finished_at.since(exit.started_at) };
            let mut backoff = container.backoff.lock().expect("nobody panics while holding it");
            backoff.handle_exit(container.config().restart, code, ran)
        };
        container.state.send_replace(match delay {
            Some(_) => ContainerState::Restarting(exit),
            None => ContainerState::Exited(exit),
        });
        container.try_save_state();
        if code == KILLED && matches!(&*container.state.borrow(), ContainerState::Exited(exit) if exit.oom_killed) {
            self.tell_container(container, "oom", &[]);
        }
        self.tell_container(container, "die", &[("exitCode", code.to_string())]);
        match delay {
            Some(delay) => self.start_after(container, delay),
            None => self.remove_if_asked(container).await,
        }
    }

    /// Starts a container after `delay`, unless something else happens to it before.
    fn start_after(self: &Arc<Self>, container: &Arc<Container>, delay: Duration) {
        let (engine, container) = (Arc::clone(self), container.clone());
        self.tasks.spawn(async move {
            let mut state = container.state.subscribe();
            let other = state.wait_for(|state| !matches!(state, ContainerState::Restarting(_)));
            tokio::select! {
                _ = other => return,
                () = tokio::time::sleep(delay) => {}
            }
            container.restarts.fetch_add(1, Ordering::Relaxed);
            engine.start_by_policy(&container).await;
        });
    }

    /// Starts a container that its policy wants to run; where that fails, the policy says what follows.
    async fn start_by_policy(self: &Arc<Self>, container: &Arc<Container>) {
        if let Err(error) = Box::pin(self.start_unless_running(container)).await {
            tracing::warn!(container = %container.id, %error, "a container could not be started again");
            let exit = match &*container.state.borrow() {
                ContainerState::Exited(exit) => exit.clone(),
                ContainerState::Created | ContainerState::Restarting(_) | ContainerState::Running(_) => return,
            };
            Box::pin(self.handle_exit(container, exit)).await;
        }
    }

    /// Removes a container that was to be gone once it has ended, and once those who read its output
    /// have all of it.
    async fn remove_if_asked(&self, container: &Container) {
        let by_hand = container.restarting_by_hand.load(Ordering::Relaxed);
        let auto_remove = container.config().auto_remove && !by_hand;
        let deadline = Instant::now() + READERS_LIMIT;
        while auto_remove && Arc::strong_count(&container.readers) > 1 && Instant::now() < deadline {
            tokio::time::sleep(READERS_PAUSE).await;
        }
        let options = RemoveOptions { force: false, volumes: true };
        if auto_remove && let Err(error) = self.remove(&container.id, options).await {
            tracing::warn!(container = %container.id, %error, "a container was not removed at its end");
        }
    }

    /// Runs the health check again and again; never ends by itself.
    async fn probe(self: Arc<Self>, container: Arc<Container>, status: HealthStatus) {
        let Some(check) = container.config().health.clone() else { return std::future::pending().await };
        let mut monitor = HealthMonitor::new(check.clone(), status, Instant::now());
        loop {
            tokio::time::sleep(monitor.pause(Instant::now())).await;
            if container.is_paused() {
                continue;
            }
            let (started_at, began) = (now(), Instant::now());
            let (code, output) =
                match self.run_command(&container, &check.command, check.timeout, PROBE_OUTPUT_MAX).await {
                    Ok((KILLED, output)) if began.elapsed() >= check.timeout => {
                        let said = if output.is_empty() { output } else { format!(": {output}") };
                        (-1, format!("Health check exceeded timeout ({:?}){said}", check.timeout))
                    }
                    Ok(result) => result,
                    Err(error) => (-1, with_causes(&error)),
                };
            let before = monitor.status();
            monitor.handle_result(code == 0, Instant::now());
            container.keep_probe(super::Probe { started_at, ended_at: now(), code, output }, monitor.failures());
            if monitor.status() != before {
                container.state.send_modify(|state| {
                    if let ContainerState::Running(running) = state {
                        running.health = monitor.status();
                    }
                });
                // Lost at worst until the next change.
                let _ = container.save_state();
                self.tell_container(&container, &format!("health_status: {}", monitor.status().as_str()), &[]);
            }
        }
    }

    /// Takes down what a running container needs; what fails is told and goes on.
    async fn clean_up(&self, container: &Container) {
        let config = container.config();
        let root = self.runtime_root(config.runtime.as_ref());
        let (id, dirs) = (container.id.clone(), container.dirs.clone());
        let result = tokio::task::spawn_blocking(move || {
            let state = root.join(&id);
            let deleted = if let Some(runtime) = &config.runtime {
                Runner { runtime, root: &root }.delete(&id, &dirs.data)
            } else if state.exists() {
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
        self.unmount_volumes(&container.id, &container.config());
        if let Some(keeper) = self.networks.keeper()
            && let Err(error) = keeper.leave(&container.id).await
        {
            tracing::warn!(container = %container.id, %error, "a container was not taken off its networks");
        }
        if let Err(error) = self.networks.disconnect(&container.id).await {
            tracing::warn!(container = %container.id, %error, "a container's network was not taken down");
        }
    }

    /// Asks a container to stop; kills it after `grace`, or after its own time.
    pub async fn stop(&self, name: &str, grace: Option<Duration>) -> Result<Exit, EngineError> {
        self.stop_with(name, None, grace).await
    }

    /// As [`stop`](Self::stop), with another signal than the container's own.
    pub async fn stop_with(
        &self,
        name: &str,
        signal: Option<&str>,
        grace: Option<Duration>,
    ) -> Result<Exit, EngineError> {
        let container = self.find(name)?;
        container.give_up_restart();
        if let ContainerState::Exited(exit) = &*container.state.borrow() {
            return Ok(exit.clone());
        }
        let exit = self.end(&container, signal, grace).await?;
        self.tell_container(&container, "stop", &[]);
        Ok(exit)
    }

    /// Ends a container's process, by SIGKILL if it does not hear another signal.
    async fn end(
        &self,
        container: &Container,
        signal: Option<&str>,
        grace: Option<Duration>,
    ) -> Result<Exit, EngineError> {
        let config = container.config();
        let own = if config.stop_signal.is_empty() { "SIGTERM" } else { &config.stop_signal };
        self.kill(&container.id, signal.unwrap_or(own))?;
        let grace = grace.or(config.stop_timeout).unwrap_or(STOP_GRACE);
        if let Ok(exit) = tokio::time::timeout(grace, self.wait(&container.id)).await {
            return exit;
        }
        self.kill(&container.id, "SIGKILL")?;
        tokio::time::timeout(KILL_LIMIT, self.wait(&container.id)).await.unwrap_or_else(|_| {
            Err(EngineError::WrongState { id: container.id.clone(), found: "running", wanted: "killed" })
        })
    }

    /// Sends a signal, by name or number, to a container's first process.
    pub fn kill(&self, name: &str, signal: &str) -> Result<(), EngineError> {
        let container = self.find(name)?;
        let number = parse_signal(signal).ok_or_else(|| EngineError::Signal(signal.to_owned()))?;
        let config = container.config();
        let stop_signal = parse_signal(&config.stop_signal).unwrap_or(libc::SIGTERM);
        let ends = number == libc::SIGKILL || number == stop_signal;
        if ends && matches!(*container.state.borrow(), ContainerState::Restarting(_)) {
            container.give_up_restart();
            self.tell_container(&container, "kill", &[("signal", number.to_string())]);
            return Ok(());
        }
        container.require_running()?;
        let ContainerState::Running(running) = container.state.borrow().clone() else { return Ok(()) };
        if ends {
            container.stopped_by_hand.store(true, Ordering::Relaxed);
        }
        let sent = sys::pidfd_open(running.pid).and_then(|pidfd| {
            // The number may be another's by now; only the shim's child is meant.
            if parent_pid(running.pid) == Some(running.shim_pid) { sys::pidfd_signal(&pidfd, number) } else { Ok(()) }
        });
        match sent {
            Ok(()) => {}
            // It has just ended.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            Err(error) => return Err(disk_error(format!("signalling container {}", container.id))(error)),
        }
        self.tell_container(&container, "kill", &[("signal", number.to_string())]);
        // What is held does not hear the signal.
        if ends && running.paused { self.set_paused(&container, false) } else { Ok(()) }
    }

    /// Holds all processes of a container, or lets them go on.
    pub fn pause(&self, name: &str, paused: bool) -> Result<(), EngineError> {
        let container = self.find(name)?;
        container.require_running()?;
        if container.is_paused() == paused {
            let found = if paused { "already paused" } else { "not paused" };
            return Err(EngineError::Conflict(format!("container {} is {found}", container.id)));
        }
        self.set_paused(&container, paused)
    }

    fn set_paused(&self, container: &Container, paused: bool) -> Result<(), EngineError> {
        let doing = if paused { "pausing" } else { "unpausing" };
        let config = container.config();
        let root = self.runtime_root(config.runtime.as_ref());
        let done = match &config.runtime {
            Some(runtime) => Runner { runtime, root: &root }.set_paused(&container.id, paused, &container.dirs.data),
            None => libcontainer::container::Container::load(root.join(&container.id))
                .and_then(|mut inner| if paused { inner.pause() } else { inner.resume() })
                .map_err(io::Error::other),
        };
        done.map_err(disk_error(format!("{doing} container {}", container.id)))?;
        container.state.send_modify(|state| {
            if let ContainerState::Running(running) = state {
                running.paused = paused;
            }
        });
        container.try_save_state();
        self.tell_container(container, if paused { "pause" } else { "unpause" }, &[]);
        Ok(())
    }

    /// Removes a container.
    pub async fn remove(&self, name: &str, options: RemoveOptions) -> Result<(), EngineError> {
        let container = self.find(name)?;
        let at_rest = || matches!(*container.state.borrow(), ContainerState::Created | ContainerState::Exited(_));
        let mut tries = 0..REMOVE_TRIES;
        let _one = loop {
            if !at_rest() {
                if !options.force || tries.next().is_none() {
                    let found = container.state.borrow().as_str();
                    return Err(EngineError::Conflict(format!(
                        "cannot remove container {:?}: container is {found}: stop the container before removing or \
                         force remove",
                        container.name()
                    )));
                }
                container.give_up_restart();
                drop(self.end(&container, Some("SIGKILL"), Some(KILL_LIMIT)).await);
            }
            let one = container.operation.lock().await;
            // It may have been about to be started once more.
            if at_rest() {
                break one;
            }
        };
        self.clean_up(&container).await;
        let dirs = container.dirs.clone();
        tokio::task::spawn_blocking(move || dirs.remove())
            .await
            .map_err(io::Error::other)
            .flatten()
            .map_err(disk_error(format!("removing container {}", container.id)))?;
        if self.lock().remove(&container.id).is_none() {
            return Ok(());
        }
        self.execs.forget_container(&container.id);
        self.tell_container(&container, "destroy", &[]);
        if options.volumes {
            self.remove_nameless_volumes(&container.config());
        }
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
                Err(_) => drop(self.dirs(&id, &ContainerConfig::default()).remove()),
            }
        }
        Ok(())
    }

    fn adopt(self: &Arc<Self>, id: String, record: Record) {
        let (state, restart) = (record.state.clone(), record.config.restart);
        let by_hand = record.stopped_by_hand;
        let dirs = self.dirs(&id, &record.config);
        let container = Arc::new(Container::from_record(id.clone(), dirs, record));
        self.lock().insert(id.clone(), container.clone());
        let of_a_build = container.config().image == BUILD_IMAGE;
        match state {
            ContainerState::Running(running) => {
                let (config, ports) = (container.config(), running.ports.clone());
                self.networks.set_links(&id, &super::networks::places(&config.network).unwrap_or_default());
                self.networks.adopt(&id, &endpoints_of(&running, &config), running.through, ports, &config.dns);
                let alive = start_ticks(running.shim_pid) == Some(running.shim_start_ticks);
                if !alive {
                    // Supervision finds it gone at once and reads what the shim left.
                    container.state.send_modify(|state| {
                        if let ContainerState::Running(running) = state {
                            running.shim_pid = 0;
                        }
                    });
                }
                self.adopt_execs(&container);
                self.supervise(container);
            }
            ContainerState::Restarting(_) => self.start_after(&container, Duration::ZERO),
            ContainerState::Exited(_) if restart::starts_with_daemon(restart, by_hand) => {
                let engine = Arc::clone(self);
                // What it needs may come up after this daemon does, such as networks of the swarm.
                container.stopped_by_hand.store(false, Ordering::Relaxed);
                self.tasks.spawn(async move { engine.start_by_policy(&container).await });
            }
            ContainerState::Exited(_) => {
                // The daemon died between its end and its removal.
                let engine = Arc::clone(self);
                self.tasks.spawn(async move { engine.remove_if_asked(&container).await });
            }
            ContainerState::Created => {}
        }
        if of_a_build {
            // Nobody waits for it any more, nor needs the layers that it stands on.
            let engine = Arc::clone(self);
            self.tasks.spawn(async move {
                let removed = engine.remove(&id, RemoveOptions { force: true, volumes: true }).await;
                if let Err(error) = removed.and_then(|()| engine.prune_layers().map(drop)) {
                    tracing::warn!(container = %id, %error, "what a build left was not removed");
                }
            });
        }
    }
}

/// A running container's places; a version that had one network alone did not write them down.
fn endpoints_of(running: &Running, config: &ContainerConfig) -> Vec<Endpoint> {
    if running.endpoints.is_empty() && config.network == NetworkMode::Bridge {
        let network = DEFAULT_NETWORK.to_owned();
        return vec![Endpoint {
            network,
            address: Some(running.address),
            address_v6: None,
            link: 0,
            gateway_priority: 0,
            names: Vec::new(),
            mac: None,
            grant: None,
        }];
    }
    running.endpoints.clone()
}

impl Container {
    /// Stops by hand what is about to be started once more.
    fn give_up_restart(&self) {
        self.stopped_by_hand.store(true, Ordering::Relaxed);
        self.state.send_if_modified(|state| match state {
            ContainerState::Restarting(exit) => {
                *state = ContainerState::Exited(exit.clone());
                true
            }
            ContainerState::Created | ContainerState::Running(_) | ContainerState::Exited(_) => false,
        });
        self.try_save_state();
    }
}

/// What a start that failed is told as: the exit code that stands for it, and the reason.
pub(super) fn start_failure(error: &io::Error, program: Option<&String>) -> (i32, String) {
    let reason = &with_causes(error);
    if !error.get_ref().is_some_and(|cause| cause.is::<RuntimeFailure>()) {
        return (CODE_NOT_TRIED, reason.to_owned());
    }
    let code = if reason.contains("not found") || reason.contains("No such file") { 127 } else { 126 };
    match (code, program) {
        // Clients look for these words.
        (127, Some(program)) => (code, format!("exec: {program:?}: executable file not found in $PATH ({reason})")),
        (126, Some(program)) if reason.contains("correct permissions") => {
            (code, format!("exec: {program:?}: permission denied ({reason})"))
        }
        _ => (code, reason.to_owned()),
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
    let read = |path| serde_json::from_slice::<ExitRecord>(&fs::read(path).ok()?).ok();
    let record = dirs.exits().into_iter().find_map(read);
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
pub(super) fn start_ticks(pid: i32) -> Option<u64> {
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
