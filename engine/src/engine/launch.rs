//! All that stands between a container's configuration and its first process: networks, file system,
//! spec, and the process that watches it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Child;

use super::kept::planned;
use super::lifecycle::start_ticks;
use super::networks::{member, places};
use super::{Container, Engine, EngineConfig, now};
use crate::container::cdi;
use crate::container::config::{
    ContainerConfig, ContainerMount, FileMount, MountSource, NamespaceMode, NetworkMode, PublishedPort, SharedMemory,
};
use crate::container::health::HealthStatus;
use crate::container::logs::file;
use crate::container::logs::forward::{self, LogSubject};
use crate::container::rootfs::ContainerDirs;
use crate::container::runtime::ExternalRuntime;
use crate::container::seccomp::Profile;
use crate::container::shim::{self, ShimAnswer, ShimConfig};
use crate::container::spec::{self, Place};
use crate::container::starter::Descent;
use crate::container::state::{ContainerState, Running};
use crate::container::{apparmor, targets, user};
use crate::network::Endpoint;
use crate::{disk, sys, volume};

/// How long a container may take to be made.
const START_LIMIT: Duration = Duration::from_secs(30);

impl Engine {
    pub(super) async fn launch(&self, container: &Arc<Container>) -> io::Result<Running> {
        let config = self.with_links(container.config())?;
        self.put_shift_in_force(container)?;
        let Connected { address, through, ports, endpoints } = self.connect(container, &config).await?;
        let host = self.host_gateway(&config, through);
        let layers = self.layer_dirs(&container.layers)?;
        self.show_images(container)?;
        let shim = self.shim_config(container)?;
        let prepared = {
            let container = container.clone();
            let peers = self.peers(&container, &config)?;
            let netns = match &config.network {
                NetworkMode::Host => None,
                NetworkMode::Container(id) => peers.get(id).map(|pid| format!("/proc/{pid}/ns/net").into()),
                NetworkMode::Bridge | NetworkMode::None | NetworkMode::Local(_) | NetworkMode::Joined(_) => {
                    Some(self.networks.netns_path(&container.id))
                }
            };
            let cgroup = self.cgroup(&container.id, &config);
            let init = config.init.unwrap_or(self.config.defaults.init).then(|| Init::new(&self.config));
            let mut volumes = self.volume_dirs(&config);
            for (name, dir) in &mut volumes {
                // One that is a file system of its own is in no view.
                let own = self.volumes.mount(name)?;
                *dir = if own { container.dirs.show(name, dir)? } else { container.dirs.view(dir) };
            }
            let first = matches!(*container.state.borrow(), ContainerState::Created);
            let shared_memory = self.shared_memory(&container, &config)?;
            let etc_of = match &config.network {
                NetworkMode::Container(id) => Some(self.owner_of_network(id).map_err(io::Error::other)?),
                _ => None,
            };
            let cdi_dirs = self.config.cdi_dirs.clone();
            let outside =
                Outside { netns, cgroup, init, volumes, shim, first, peers, host, shared_memory, etc_of, cdi_dirs };
            let mut config = ContainerConfig::clone(&config);
            self.config.defaults.apply_at_start(&mut config);
            let addresses = endpoints.first().map_or_else(|| vec![address.into()], Endpoint::addresses);
            move || prepare(&container, &config, &layers, &addresses, outside)
        };
        tokio::task::spawn_blocking(prepared).await.map_err(io::Error::other)??;
        let started_at = now();
        let listener = container.let_attached_in()?;
        let (shim_pid, pid) = self.spawn_shim(&container.dirs.data, listener).await?;
        let health = if config.health.is_some() { HealthStatus::Starting } else { HealthStatus::None };
        Ok(Running {
            pid,
            shim_pid,
            shim_start_ticks: start_ticks(shim_pid).unwrap_or(0),
            started_at,
            address,
            endpoints,
            through,
            ports,
            health,
            paused: false,
        })
    }

    /// Has the map of a container's users in force, if it has one.
    pub(super) fn put_shift_in_force(&self, container: &Container) -> io::Result<()> {
        let Some(shift) = &container.dirs.shift else { return Ok(()) };
        let _one = self.shifting.lock().expect("nobody panics while holding it");
        tokio::task::block_in_place(|| shift.ensure(&self.helper))
    }

    /// Gives a container what it is to see of networks.
    async fn connect(&self, container: &Container, config: &ContainerConfig) -> io::Result<Connected> {
        let alone =
            || Connected { address: Ipv4Addr::LOCALHOST, through: None, ports: Vec::new(), endpoints: Vec::new() };
        match &config.network {
            NetworkMode::Bridge | NetworkMode::Local(_) => {
                let places = places(&config.network).unwrap_or_default();
                let member = member(container, config);
                self.networks.set_links(&container.id, &places);
                let granted = self.ask_keeper(&member, &places).await?;
                let (endpoints, ports) = self.networks.connect(&member, &places, granted).await?;
                let through = self.join_kept(&member, &endpoints, &ports).await?;
                let address = endpoints.first().and_then(|endpoint| endpoint.address).unwrap_or(Ipv4Addr::LOCALHOST);
                Ok(Connected { address, through, ports, endpoints })
            }
            NetworkMode::Host | NetworkMode::Container(_) => Ok(alone()),
            NetworkMode::None => self.networks.isolate(&member(container, config)).await.map(|()| alone()),
            NetworkMode::Joined(networks) => {
                let member = member(container, config);
                let ports = self.networks.prepare(&member).await?;
                let through = self.join_kept(&member, &planned(networks), &ports).await?;
                let address = networks.first().map_or(Ipv4Addr::LOCALHOST, |network| network.address);
                Ok(Connected { address, through, ports, endpoints: Vec::new() })
            }
        }
    }

    /// The compiled system-call filter of a container that takes one.
    pub(super) fn filter(&self, config: &ContainerConfig) -> io::Result<Option<PathBuf>> {
        let profile = config.has_compiled_filter().then(|| Profile::new(&spec::capabilities(config)));
        profile.map(|profile| profile.ensure_compiled(&self.config.run_dir.join("seccomp"))).transpose()
    }

    fn shim_config(&self, container: &Container) -> io::Result<ShimConfig> {
        let cgroup = self.cgroup(&container.id, &container.config());
        let relative = cgroup.strip_prefix("/").unwrap_or(&cgroup);
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let oom_file = if v1.exists() {
            v1.join(relative).join("memory.oom_control")
        } else {
            Path::new("/sys/fs/cgroup").join(relative).join("memory.events")
        };
        Ok(ShimConfig {
            id: container.id.clone(),
            root: self.runtime_root(container.config().runtime.as_ref()),
            runtime: container.config().runtime.clone(),
            bundle: container.dirs.data.clone(),
            log: container.config().log.clone(),
            log_path: container.config().log.kept().map(|format| container.dirs.log(format)).unwrap_or_default(),
            log_subject: log_subject(container),
            run_dir: container.dirs.run.clone(),
            stdio: stdio(&container.config()),
            filter: self.filter(&container.config())?,
            descent: None,
            oom_file,
        })
    }

    /// Where a runtime keeps what it knows of containers.
    pub(super) fn runtime_root(&self, runtime: Option<&ExternalRuntime>) -> PathBuf {
        self.config.run_dir.join(if runtime.is_some() { "external" } else { "state" })
    }

    pub(super) fn cgroup(&self, id: &str, config: &ContainerConfig) -> PathBuf {
        let parent = if config.cgroup_parent.is_empty() { &self.config.cgroup_parent } else { &config.cgroup_parent };
        // A request that climbs out of the hierarchy stays at its top.
        let parts = Path::new(parent).components().filter(|part| matches!(part, Component::Normal(_)));
        Path::new("/").join(parts.collect::<PathBuf>()).join(id)
    }

    /// The first processes of the containers whose namespaces are shared; all of them must run.
    fn peers(&self, container: &Container, config: &ContainerConfig) -> io::Result<BTreeMap<String, i32>> {
        let mut peers = BTreeMap::new();
        let modes = [("PID", &config.pid_mode), ("IPC", &config.ipc_mode), ("UTS", &config.uts_mode)];
        let shared = modes.into_iter().filter_map(|(what, mode)| match mode {
            NamespaceMode::Container(id) => Some((what, id)),
            NamespaceMode::Private | NamespaceMode::Host => None,
        });
        let network = match &config.network {
            NetworkMode::Container(id) => Some(("network", id)),
            NetworkMode::Bridge
            | NetworkMode::Host
            | NetworkMode::None
            | NetworkMode::Local(_)
            | NetworkMode::Joined(_) => None,
        };
        for (what, id) in shared.chain(network) {
            let peer = self.find(id).map_err(io::Error::other)?;
            if peer.id == container.id {
                return Err(io::Error::other(format!("cannot join own {what}: name another container")));
            }
            if peer.config().id_map != config.id_map {
                return Err(io::Error::other(format!(
                    "container {id}, whose namespace is to be shared, has other users: both need --userns=host, or neither"
                )));
            }
            let ContainerState::Running(running) = peer.state.borrow().clone() else {
                return Err(io::Error::other(format!(
                    "cannot join {what} of a non running container: failed to join {what} namespace: container {id} is not running; start that one first"
                )));
            };
            peers.insert(id.clone(), running.pid);
        }
        Ok(peers)
    }

    /// The memory that a container shares with others: what it has itself to share, or what one has whose IPC
    /// namespace it joins.
    fn shared_memory(&self, container: &Container, config: &ContainerConfig) -> io::Result<Option<PathBuf>> {
        match &config.ipc_mode {
            NamespaceMode::Private if config.shared_memory == SharedMemory::Shareable => {
                container.dirs.make_shared_memory(config.shm_size_bytes()).map(Some)
            }
            NamespaceMode::Private | NamespaceMode::Host => Ok(None),
            NamespaceMode::Container(id) => {
                let donor = self.find(id).map_err(io::Error::other)?;
                if donor.config().shared_memory == SharedMemory::Shareable {
                    return Ok(Some(donor.dirs.shared_memory()));
                }
                Err(io::Error::other(format!(
                    "cannot join IPC of container {id}: non-shareable IPC; make that one with --ipc=shareable"
                )))
            }
        }
    }

    pub(super) fn volume_dirs(&self, config: &ContainerConfig) -> BTreeMap<String, PathBuf> {
        let names = config.mounts.iter().filter_map(|mount| match &mount.source {
            MountSource::Volume { name, .. } => Some(name),
            MountSource::Bind { .. } | MountSource::Tmpfs { .. } | MountSource::Image { .. } => None,
        });
        names.map(|name| (name.clone(), self.volumes.data_dir(name))).collect()
    }

    /// Mounts the images that a container shows, each with a layer of the container's own on top.
    pub(super) fn show_images(&self, container: &Container) -> io::Result<()> {
        for (number, mount) in container.config().mounts.iter().enumerate() {
            if let MountSource::Image { layers, .. } = &mount.source {
                let dirs = container.dirs.of_mount(number);
                fs::create_dir_all(&dirs.data)?;
                dirs.mount_root(&self.layer_dirs(layers)?)?;
            }
        }
        Ok(())
    }

    /// Runs the shim and waits for its answer: its pid and the container's.
    async fn spawn_shim(&self, dir: &Path, listener: OwnedFd) -> io::Result<(i32, i32)> {
        for root in ["state", "external"] {
            fs::create_dir_all(self.config.run_dir.join(root))?;
        }
        let mut shim = self.shim("shim", dir, listener)?;
        let shim_pid = shim.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
        let answer = read_answer(&mut shim).await;
        // The shim lives on; it is only waited for so that it leaves no zombie.
        self.tasks.spawn(async move { drop(shim.wait().await) });
        Ok((shim_pid, answer?))
    }

    /// One of the program's own helpers, with `listener` as its standard input.
    pub(super) fn shim(&self, command: &str, dir: &Path, listener: OwnedFd) -> io::Result<Child> {
        self.helper
            .command()
            .arg(command)
            .arg(dir)
            .stdin(Stdio::from(listener))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()
    }
}

/// Why a runtime could not start a program.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct RuntimeFailure(String);

/// Waits until a helper has started its process; returns that one's pid.
pub(super) async fn read_answer(shim: &mut Child) -> io::Result<i32> {
    let stdout = shim.stdout.take().ok_or_else(|| io::Error::other("the shim has no output"))?;
    let mut line = String::new();
    let mut reader = BufReader::new(stdout);
    tokio::time::timeout(START_LIMIT, reader.read_line(&mut line))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("the shim said nothing in {START_LIMIT:?}")))??;
    match serde_json::from_str(&line) {
        Ok(ShimAnswer::Started { pid }) => Ok(pid),
        Ok(ShimAnswer::Failed { reason }) => Err(io::Error::other(RuntimeFailure(reason))),
        Err(_) => Err(io::Error::other("the shim ended without an answer")),
    }
}

fn log_subject(container: &Container) -> LogSubject {
    let config = container.config();
    LogSubject {
        id: container.id.clone(),
        name: config.name.clone(),
        image: config.image.clone(),
        image_id: config.image_id.clone(),
        command: config.command().join(" "),
        created: container.created,
        attributes: config.log_attributes(),
    }
}

fn stdio(config: &ContainerConfig) -> shim::Stdio {
    if config.tty { shim::Stdio::Terminal } else { shim::Stdio::Pipes { open_stdin: config.open_stdin } }
}

/// What a container has of networks once it is connected.
struct Connected {
    address: Ipv4Addr,
    through: Option<Ipv4Addr>,
    ports: Vec<PublishedPort>,
    endpoints: Vec<Endpoint>,
}

/// Where an init is shown to containers.
const INIT: &str = "/sbin/skep-init";

/// The program that is a container's first if it asks for an init.
struct Init {
    path: PathBuf,
    /// What it is run by, before the command.
    words: &'static [&'static str],
}

impl Init {
    fn new(config: &EngineConfig) -> Self {
        match &config.init_path {
            Some(path) => Self { path: path.clone(), words: &[INIT, "--"] },
            None => Self { path: config.data_dir.join("bin/skep-init"), words: &[INIT, "init", "--"] },
        }
    }
}

/// What a container needs from outside its own directories.
struct Outside {
    /// None: the host's.
    netns: Option<PathBuf>,
    cgroup: PathBuf,
    init: Option<Init>,
    volumes: BTreeMap<String, PathBuf>,
    shim: ShimConfig,
    /// Whether it has never run.
    first: bool,
    /// The first processes of the containers whose namespaces it shares.
    peers: BTreeMap<String, i32>,
    /// Where it reaches the host.
    host: Vec<IpAddr>,
    shared_memory: Option<PathBuf>,
    /// Whose network it is in, and so whose /etc/hosts and the like it sees.
    etc_of: Option<Arc<Container>>,
    cdi_dirs: Vec<PathBuf>,
}

/// A part of a volume that is there, held open; all of it if none is named.
fn part_of(volume: &Path, subpath: &str) -> io::Result<(fs::File, PathBuf)> {
    let opened = sys::open_in_root(volume, Path::new(if subpath.is_empty() { "." } else { subpath }))?;
    let path = Path::new("/proc/self/fd").join(opened.as_raw_fd().to_string());
    Ok((opened, path))
}

/// Gives empty volumes what the image has in their place.
pub(super) fn populate_volumes(
    config: &ContainerConfig,
    root: &Path,
    volumes: &BTreeMap<String, PathBuf>,
) -> io::Result<()> {
    for mount in &config.mounts {
        if let MountSource::Volume { name, no_copy: false, subpath, .. } = &mount.source
            && let Ok(volume) = part_of(&volumes[name], subpath)
            && let Ok(place) = sys::open_in_root(root, Path::new(mount.target.trim_start_matches('/')))
        {
            let place = Path::new("/proc/self/fd").join(place.as_raw_fd().to_string());
            volume::populate(&volume.1, &place)?;
        }
    }
    Ok(())
}

/// Shows the images that are mounted, and the parts of them and of volumes that are asked for, by target; each must be
/// there, and within its image or volume.
fn show_parts(
    config: &ContainerConfig,
    dirs: &ContainerDirs,
    volumes: &BTreeMap<String, PathBuf>,
) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut shown = BTreeMap::new();
    for (number, mount) in config.mounts.iter().enumerate() {
        let (whole, of, subpath) = match &mount.source {
            MountSource::Volume { name, subpath, .. } if !subpath.is_empty() => {
                (volumes[name].clone(), format!("volume {name}"), subpath)
            }
            MountSource::Image { image, subpath, .. } => {
                let whole = dirs.of_mount(number).rootfs();
                if subpath.is_empty() {
                    shown.insert(mount.target.clone(), whole);
                    continue;
                }
                (whole, format!("image {image}"), subpath)
            }
            MountSource::Volume { .. } | MountSource::Bind { .. } | MountSource::Tmpfs { .. } => continue,
        };
        let opened = sys::open_in_root(&whole, Path::new(subpath)).map_err(|error| {
            let why = format!("cannot access path {subpath} of {of}, to be mounted at {}: {error}", mount.target);
            io::Error::new(error.kind(), why)
        })?;
        shown.insert(mount.target.clone(), dirs.show_opened(&format!("part-{number}"), &opened)?);
    }
    Ok(shown)
}

/// Makes the directory that the first process is to begin in, wherever that lies; a tmpfs is not there yet, and what is not
/// to be written is not.
pub(super) fn make_working_dir(
    config: &ContainerConfig,
    root: &Path,
    volumes: &BTreeMap<String, PathBuf>,
) -> io::Result<()> {
    let dir = Path::new(&config.working_dir);
    let within = |mount: &&ContainerMount| dir.starts_with(&mount.target);
    let mount = config.mounts.iter().filter(within).max_by_key(|mount| mount.target.len());
    if mount.is_some_and(|mount| mount.read_only) {
        return Ok(());
    }
    let (root, at) = match mount.map(|mount| (&mount.source, &mount.target)) {
        Some((MountSource::Volume { subpath, .. }, _)) if !subpath.is_empty() => return Ok(()),
        Some((MountSource::Volume { name, .. }, target)) => (volumes[name].as_path(), target.as_str()),
        Some((MountSource::Bind { path, .. }, target)) => (Path::new(path), target.as_str()),
        Some((MountSource::Tmpfs { .. } | MountSource::Image { .. }, _)) => return Ok(()),
        None => (root, "/"),
    };
    let inside = dir.strip_prefix(at).unwrap_or_else(|_| Path::new(""));
    let made = sys::ensure_dir(root, inside, None);
    made.map(drop).map_err(|error| {
        io::Error::new(error.kind(), format!("the working directory {} cannot be made: {error}", dir.display()))
    })
}

/// Puts everything in place on disk that the shim reads.
fn prepare(
    container: &Container,
    config: &ContainerConfig,
    layers: &[PathBuf],
    addresses: &[IpAddr],
    outside: Outside,
) -> io::Result<()> {
    let dirs = &container.dirs;
    fs::create_dir_all(&dirs.run)?;
    fs::set_permissions(&dirs.data, fs::Permissions::from_mode(0o710))?;
    dirs.mount_root(layers)?;
    targets::check_in_root(config, &dirs.rootfs())?;
    if outside.first {
        dirs.as_root(|| populate_volumes(config, &dirs.rootfs(), &outside.volumes))?;
    }
    let parts = show_parts(config, dirs, &outside.volumes)?;
    let user = user::resolve(&dirs.rootfs(), &config.user, &config.groups).map_err(io::Error::other)?;
    dirs.as_root(|| make_working_dir(config, &dirs.rootfs(), &outside.volumes))?;
    let mut files = match &outside.etc_of {
        Some(other) => other.dirs.shown_etc(config.read_only),
        None => dirs.write_etc(config, addresses, &outside.host)?,
    };
    files.extend(dirs.write_payloads(&config.payloads)?);
    if let Some(init) = &outside.init {
        files.push(FileMount { source: dirs.view(&init.path), target: INIT.into(), read_only: true });
    }
    let place = Place {
        rootfs: &dirs.rootfs(),
        bundle: &dirs.data,
        netns: outside.netns.as_deref(),
        cgroup: &outside.cgroup,
        files: &files,
        volumes: &outside.volumes,
        parts: &parts,
        user: &user,
        apparmor: apparmor::ensure(config)?,
        shared_memory: outside.shared_memory.as_deref(),
        peers: &outside.peers,
        shift: dirs.shift.as_ref(),
        init_words: outside.init.as_ref().map_or(&[], |init| init.words),
    };
    if config.command().is_empty() {
        return Err(io::Error::other("no command is given, and the image names none"));
    }
    if let Some(format) = config.log.kept() {
        file::ensure(&dirs.log(format))?;
    }
    // Names are looked up here, where nobody else waits for it.
    let mut spec = spec::build(config, &place);
    cdi::apply(&config.cdi_devices, &outside.cdi_dirs, &mut spec).map_err(io::Error::other)?;
    let descent = config.has_descent().then(|| Descent::take_from(&mut spec));
    let shim = ShimConfig { log: forward::reachable(&config.log)?, descent, ..outside.shim };
    disk::write_passing(&dirs.data.join("config.json"), spec.to_string().as_bytes())?;
    disk::write_passing(&dirs.data.join("shim.json"), &serde_json::to_vec(&shim)?)?;
    for path in dirs.exits() {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
