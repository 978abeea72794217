//! The engine as its users see it.

mod attach;
mod change;
mod container;
mod create;
mod exec;
mod files;
mod helper;
mod images;
mod kept;
mod launch;
mod lifecycle;
mod links;
mod networks;
mod pools;
mod volumes;

pub use attach::{Attachment, InputWriter, OutputReader};
pub use change::{BlockCount, Usage};
pub(crate) use container::Container;
pub use container::Probe;
use container::Record;
pub(crate) use exec::EXIT;
pub use exec::{Exec, ExecSpec, ExecState};
pub use files::{Archiving, Change, CommitOptions, PathStat, Writing};
pub(crate) use helper::HelperProgram;
pub use images::HistoryLine;
pub use lifecycle::RemoveOptions;
pub use links::link_parts;
pub use networks::{LocalNetworkSpec, NetworkRef};
pub use pools::AddressPool;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use skep_api::Timestamp;
use skep_api::container::Ulimit;
use tokio::sync::{broadcast, watch};
use tokio_util::task::TaskTracker;

use crate::container::config::ContainerConfig;
use crate::container::id_map::{IdMap, Shift};
use crate::container::logs::config::{LogConfig, LogConfigError};
use crate::container::logs::reader::{self, LogOptions, LogStream};
use crate::container::rootfs::ContainerDirs;
use crate::container::runtime::ExternalRuntime;
use crate::container::state::{ContainerState, Exit};
use crate::container::storage::{Storage, StorageDriver};
use crate::engine::exec::ExecStore;
use crate::image::pull::{PullError, Puller, RegistryConfig};
use crate::image::store::ImageStore;
use crate::image::{builtin, familiar};
use crate::network::{self, BridgeConfig, Networks};
use crate::turns::Turns;
use crate::volume::{VolumeError, VolumeStore};

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Images, volumes, containers.
    pub data_dir: PathBuf,
    /// What does not outlive a start of the host.
    pub run_dir: PathBuf,
    /// The program that is its own shim.
    pub program: PathBuf,
    /// Below which cgroup containers have theirs.
    pub cgroup_parent: String,
    /// For containers that do not say: whether set-user-id bits and the like gain nothing.
    pub no_new_privileges: bool,
    /// For containers that do not ask for the host's users.
    pub id_map: Option<IdMap>,
    /// What makes containers' roots; none: what the data directory's file system lets.
    pub storage: Option<StorageDriver>,
    /// For tasks; none: the built-in one.
    pub runtime: Option<ExternalRuntime>,
    /// For containers that do not say.
    pub log: LogConfig,
    pub bridge: BridgeConfig,
    /// Whether a process listens at published ports, for clients whom no rule leads to their containers.
    pub userland_proxy: bool,
    /// Where networks that name no subnet get theirs.
    pub pools: Vec<AddressPool>,
    /// What `host-gateway` stands for; none: what the container reaches its host by.
    pub host_gateways: Vec<IpAddr>,
    /// The program that `--init` runs, by tini's arguments; none: our own.
    pub init_path: Option<PathBuf>,
    /// Where files name devices (CDI); the later ones count more.
    pub cdi_dirs: Vec<PathBuf>,
    pub defaults: ContainerDefaults,
    pub registries: RegistryConfig,
}

/// What containers have that do not say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContainerDefaults {
    pub dns: Vec<String>,
    pub dns_options: Vec<String>,
    pub dns_search: Vec<String>,
    pub ulimits: Vec<Ulimit>,
    /// 0: 64 MiB.
    pub shm_size_bytes: i64,
    /// As the OCI runtime-spec has it; null: the built-in one.
    pub seccomp_profile: serde_json::Value,
    /// Whether an init runs first in those that do not say when they start.
    pub init: bool,
}

impl ContainerDefaults {
    /// Fills in what a container has from then on.
    fn apply(&self, config: &mut ContainerConfig) {
        for (own, usual) in [
            (&mut config.dns, &self.dns),
            (&mut config.dns_options, &self.dns_options),
            (&mut config.dns_search, &self.dns_search),
        ] {
            if own.is_empty() {
                own.clone_from(usual);
            }
        }
        if config.shm_size_bytes == 0 {
            config.shm_size_bytes = self.shm_size_bytes;
        }
        if config.seccomp && config.seccomp_profile.is_null() {
            config.seccomp_profile.clone_from(&self.seccomp_profile);
        }
    }

    /// Fills in what a container has until it is started again.
    fn apply_at_start(&self, config: &mut ContainerConfig) {
        for usual in &self.ulimits {
            if !config.ulimits.iter().any(|own| own.name == usual.name) {
                config.ulimits.push(usual.clone());
            }
        }
    }
}

impl EngineConfig {
    /// The usual setup below two directories.
    #[must_use]
    pub fn new(data_dir: PathBuf, run_dir: PathBuf, program: PathBuf) -> Self {
        Self {
            data_dir,
            run_dir,
            program,
            cgroup_parent: "/skep".into(),
            no_new_privileges: true,
            id_map: None,
            storage: None,
            runtime: None,
            log: LogConfig::default(),
            bridge: BridgeConfig::default(),
            userland_proxy: true,
            pools: AddressPool::usual(),
            host_gateways: Vec::new(),
            init_path: None,
            cdi_dirs: Vec::new(),
            defaults: ContainerDefaults::default(),
            registries: RegistryConfig::default(),
        }
    }
}

/// Why the engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("No such container: {0}")]
    NoContainer(String),
    #[error("No such image: {0}")]
    NoImage(String),
    #[error(
        "image with reference {image} was found but does not match the specified platform: wanted {wanted}, actual: {actual}"
    )]
    OtherPlatform { image: String, wanted: String, actual: String },
    #[error("the name {name:?} is already in use by container {id}: remove or rename that one")]
    NameTaken { name: String, id: String },
    #[error("container {id} is not {wanted}: it is {found}")]
    WrongState { id: String, found: &'static str, wanted: &'static str },
    #[error("container {id} could not be started: {reason}")]
    Start { id: String, reason: String },
    #[error("network {0} not found")]
    NoNetwork(String),
    #[error("get {0}: no such volume")]
    NoVolume(String),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("No such exec instance: {0}")]
    NoExec(String),
    #[error("configured logging driver does not support reading: {0} keeps nothing on this host")]
    LogsNotKept(&'static str),
    #[error("{0}")]
    Conflict(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Forbidden(String),
    #[error("Could not find the file {path} in container {container}")]
    NoFile { path: String, container: String },
    #[error("Invalid signal: {0}")]
    Signal(String),
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error("{doing} failed")]
    Disk {
        doing: String,
        #[source]
        cause: io::Error,
    },
}

fn disk_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> EngineError {
    let doing = doing.into();
    |cause| EngineError::Disk { doing, cause }
}

/// Something happened to a container or image.
#[derive(Clone, Debug)]
pub struct EngineEvent {
    /// `container` or `image`.
    pub kind: &'static str,
    /// The Engine API's word, such as `start` or `die`.
    pub action: String,
    pub id: String,
    pub attributes: BTreeMap<String, String>,
    pub at: Timestamp,
}

/// All that is told of one container.
#[derive(Clone, Debug)]
pub struct Inspection {
    pub id: String,
    pub config: Arc<ContainerConfig>,
    pub created: Timestamp,
    pub state: ContainerState,
    /// Its lines of JSON, if they are kept as such.
    pub log_path: Option<PathBuf>,
    /// Its own directory, and those of its image's layers, the lowest first.
    pub data_dir: PathBuf,
    pub layer_dirs: Vec<String>,
    pub netns: Option<PathBuf>,
    /// How often it was started again by its restart policy.
    pub restarts: u32,
    /// The last results of its health check, the oldest first, and how many failed in a row.
    pub probes: Vec<Probe>,
    pub failing_streak: u32,
    /// Its execs that run.
    pub execs: Vec<String>,
}

/// The containers and images of one host.
pub struct Engine {
    config: EngineConfig,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    images: Arc<ImageStore>,
    puller: Puller,
    /// What helpers are started from.
    helper: Arc<HelperProgram>,
    storage: StorageDriver,
    /// One map is put in force at a time.
    shifting: Mutex<()>,
    /// One at a time puts the image into the store that the program carries.
    carrying: Mutex<()>,
    volumes: VolumeStore,
    networks: Networks,
    execs: ExecStore,
    /// Held by whatever brings layers that no image has yet.
    layers_under_way: tokio::sync::RwLock<()>,
    /// At what steps of builds keep for the next ones.
    build_caches: Turns,
    events: broadcast::Sender<EngineEvent>,
    past_events: Mutex<VecDeque<EngineEvent>>,
    tasks: TaskTracker,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("data_dir", &self.config.data_dir).finish_non_exhaustive()
    }
}

/// As long as other engines take from a container's start to their answer.
const FIRST_WORDS_LIMIT: Duration = Duration::from_millis(100);

/// Events a slow listener may fall behind before it misses some; as many are remembered.
const EVENTS_KEPT: usize = 1024;

pub(crate) fn now() -> Timestamp {
    Timestamp::from_system(SystemTime::now())
}

impl Engine {
    /// Opens the engine and takes up the containers that are there, running or not.
    pub fn open(config: EngineConfig) -> Result<Arc<Self>, EngineError> {
        // The contexts of builds that were cut off.
        let _ = fs::remove_dir_all(config.data_dir.join("tmp"));
        for dir in ["containers", "bin"] {
            make_dir(&config.data_dir.join(dir))?;
        }
        make_dir(&config.run_dir.join("containers"))?;
        let images =
            Arc::new(ImageStore::open(&config.data_dir.join("image")).map_err(disk_error("opening the image store"))?);
        builtin::install(&config.data_dir.join("bin/skep-init"))
            .or_else(busy)
            .map_err(disk_error("storing skep-init"))?;
        let helper = Arc::new(HelperProgram::new(&config.program));
        let engine = Arc::new(Self {
            puller: Puller::new(config.registries.clone(), images.clone()),
            volumes: VolumeStore::open(&config.data_dir.join("volumes")).map_err(disk_error("opening the volumes"))?,
            networks: Networks::open(
                &config.bridge,
                config.data_dir.join("networks"),
                &config.run_dir,
                helper.clone(),
                config.userland_proxy,
            )
            .map_err(disk_error("preparing the networks"))?,
            containers: Mutex::default(),
            images,
            execs: ExecStore::default(),
            layers_under_way: tokio::sync::RwLock::default(),
            build_caches: Turns::default(),
            events: broadcast::channel(EVENTS_KEPT).0,
            past_events: Mutex::default(),
            tasks: TaskTracker::new(),
            helper,
            storage: StorageDriver::choose(config.storage, &config.data_dir)
                .map_err(disk_error(format!("making containers' files in {}", config.data_dir.display())))?,
            shifting: Mutex::default(),
            carrying: Mutex::default(),
            config,
        });
        engine.adopt_all()?;
        let serving = engine.clone();
        engine.tasks.spawn(async move {
            serving.networks.serve_names().await;
            serving.networks.listen_at_ports().await;
        });
        tokio::spawn(network::guard(Arc::downgrade(&engine), Self::networks_of));
        // What a build left that failed, or was cut off.
        engine.prune_layers()?;
        Ok(engine)
    }

    fn networks_of(&self) -> &Networks {
        &self.networks
    }

    fn shift(&self, map: IdMap) -> Shift {
        Shift::new(map, &self.config.data_dir, &self.config.run_dir)
    }

    fn dirs(&self, id: &str, config: &ContainerConfig) -> ContainerDirs {
        let id_map = config.id_map.as_ref();
        ContainerDirs {
            data: self.config.data_dir.join("containers").join(id),
            run: self.config.run_dir.join("containers").join(id),
            shift: id_map.map(|map| self.shift(map.clone())),
            storage: config.storage.open(&self.config.data_dir),
        }
    }

    /// What makes the roots of new containers.
    #[must_use]
    pub const fn storage_driver(&self) -> StorageDriver {
        self.storage
    }

    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        self.storage.open(&self.config.data_dir)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Container>>> {
        self.containers.lock().expect("nobody panics while holding it")
    }

    /// Finds a container by id, name, or the beginning of its id.
    fn find(&self, name: &str) -> Result<Arc<Container>, EngineError> {
        let containers = self.lock();
        let bare = name.strip_prefix('/').unwrap_or(name);
        let exact = containers.get(bare).or_else(|| containers.values().find(|c| c.name() == bare));
        let found = exact.cloned().or_else(|| {
            let mut matching = containers.range(bare.to_owned()..).take_while(|(id, _)| id.starts_with(bare));
            let first = matching.next().filter(|_| !bare.is_empty());
            first.filter(|_| matching.next().is_none()).map(|(_, container)| container.clone())
        });
        found.ok_or_else(|| EngineError::NoContainer(name.to_owned()))
    }

    fn tell(&self, kind: &'static str, action: &str, id: &str, attributes: BTreeMap<String, String>) {
        let event = EngineEvent { kind, action: action.to_owned(), id: id.to_owned(), attributes, at: now() };
        let mut past = self.past_events.lock().expect("nobody panics while holding it");
        if past.len() >= EVENTS_KEPT {
            past.pop_front();
        }
        past.push_back(event.clone());
        // Nobody listening is no error.
        drop(self.events.send(event));
    }

    /// Tells of the daemon itself.
    pub fn tell_daemon(&self, action: &str, id: &str, attributes: BTreeMap<String, String>) {
        self.tell("daemon", action, id, attributes);
    }

    fn tell_container(&self, container: &Container, action: &str, more: &[(&str, String)]) {
        let config = container.config();
        let mut attributes = config.labels.clone();
        attributes.insert("image".into(), familiar(&config.image).to_owned());
        attributes.insert("name".into(), config.name.clone());
        attributes.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        self.tell("container", action, &container.id, attributes);
    }

    /// What has happened since a time, as far as it is remembered, and what happens from now on.
    #[must_use]
    pub fn events(&self, since: Option<Timestamp>) -> (Vec<EngineEvent>, broadcast::Receiver<EngineEvent>) {
        // Both under one lock: nothing is missed or told twice.
        let past = self.past_events.lock().expect("nobody panics while holding it");
        let wanted = past.iter().filter(|event| since.is_some_and(|since| event.at >= since));
        (wanted.cloned().collect(), self.events.subscribe())
    }

    pub(crate) fn image_store(&self) -> &Arc<ImageStore> {
        &self.images
    }

    /// The directories that a container's file system is made of, the lowest first.
    fn layer_dirs(&self, layers: &[String]) -> io::Result<Vec<PathBuf>> {
        let mut dirs: Vec<_> = layers.iter().map(|layer| self.images.layer_dir(layer)).collect();
        dirs.push(init_layer(&self.config.data_dir.join("image/init"), &dirs)?);
        Ok(dirs)
    }

    pub(crate) fn container_dirs(&self, name: &str) -> Result<ContainerDirs, EngineError> {
        Ok(self.find(name)?.dirs.clone())
    }

    pub fn inspect(&self, name: &str) -> Result<Inspection, EngineError> {
        let container = self.find(name)?;
        let mut inspection = container.inspection(self.execs.of_container(&container.id));
        let layer = |layer: &String| self.images.layer_dir(layer).display().to_string();
        inspection.layer_dirs = container.layers.iter().map(layer).collect();
        inspection.netns = Some(self.networks.netns_path(&container.id)).filter(|path| path.exists());
        Ok(inspection)
    }

    /// All containers, in the order of their ids.
    #[must_use]
    pub fn list(&self) -> Vec<Inspection> {
        self.lock().values().map(|container| container.inspection(Vec::new())).collect()
    }

    /// Follows a container's state.
    pub fn watch(&self, name: &str) -> Result<watch::Receiver<ContainerState>, EngineError> {
        Ok(self.find(name)?.state.subscribe())
    }

    /// Waits until the container has ended.
    pub async fn wait(&self, name: &str) -> Result<Exit, EngineError> {
        let mut state = self.watch(name)?;
        loop {
            if let ContainerState::Exited(exit) = &*state.borrow_and_update() {
                return Ok(exit.clone());
            }
            if state.changed().await.is_err() {
                return Err(EngineError::NoContainer(name.to_owned()));
            }
        }
    }

    /// Gives a container that has just been started the time for its first words: scripts that start one and ask what it
    /// has said expect them.
    pub async fn await_first_words(&self, name: &str) {
        let Ok(container) = self.find(name) else { return };
        let mut state = container.state.subscribe();
        let since = match &*state.borrow() {
            ContainerState::Running(running) => now().since(running.started_at),
            ContainerState::Created | ContainerState::Restarting(_) | ContainerState::Exited(_) => return,
        };
        let ended = state.wait_for(|state| !matches!(state, ContainerState::Running(_)));
        // Whichever comes first.
        drop(tokio::time::timeout(FIRST_WORDS_LIMIT.saturating_sub(since), ended).await);
    }

    /// Reads a container's output.
    pub fn logs(&self, name: &str, options: LogOptions) -> Result<LogStream, EngineError> {
        let container = self.find(name)?;
        let Some(format) = container.config().log.kept() else {
            return Err(EngineError::LogsNotKept(container.config().log.driver.as_str()));
        };
        let (state, reading) = (container.state.subscribe(), container.readers.clone());
        let ended = move || {
            // As long as this is asked, somebody reads.
            let _ = &reading;
            match &*state.borrow() {
                ContainerState::Running(_) | ContainerState::Restarting(_) | ContainerState::Created => {
                    state.has_changed().is_err()
                }
                ContainerState::Exited(_) => true,
            }
        };
        Ok(reader::read(container.dirs.log(format), format, options, ended))
    }

    /// A container's log, from what its user asks for and what the daemon has for those who do not.
    pub fn log_config(&self, driver: &str, options: &BTreeMap<String, String>) -> Result<LogConfig, LogConfigError> {
        LogConfig::parse(driver, options, &self.config.log)
    }

    /// The runtime of containers that do not say.
    #[must_use]
    pub fn default_runtime(&self) -> Option<ExternalRuntime> {
        self.config.runtime.clone()
    }

    /// The program that is its own shim.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.config.program
    }

    /// Where data lies, for `info`.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.config.data_dir
    }

    /// Lets go of the containers without stopping them; waits at most `limit` for work under way.
    pub async fn close(&self, limit: Duration) {
        self.tasks.close();
        if tokio::time::timeout(limit, self.tasks.wait()).await.is_err() {
            tracing::debug!("containers go on; their shims keep what happens");
        }
    }
}

fn make_dir(dir: &Path) -> Result<(), EngineError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = fs::DirBuilder::new().recursive(true).mode(0o711).create(dir);
    made.map_err(disk_error(format!("making {}", dir.display())))
}

/// The topmost layer below every container's own: the places where files and file systems are mounted, so that making
/// them is no change of the container's. One for each owner and mode that images give `/etc`, which it would hide.
fn init_layer(dir: &Path, layers: &[PathBuf]) -> io::Result<PathBuf> {
    let etc = layers.iter().rev().find_map(|layer| fs::symlink_metadata(layer.join("etc")).ok());
    let etc = etc.filter(fs::Metadata::is_dir).map_or((0, 0, 0o755), |etc| (etc.uid(), etc.gid(), etc.mode() & 0o7777));
    let (uid, gid, mode) = etc;
    let layer = dir.join(format!("{uid}-{gid}-{mode:o}"));
    if layer.join(INIT_LAYER_FILES[0]).exists() {
        return Ok(layer);
    }
    for sub in ["dev/pts", "dev/shm", "proc", "sys", "etc"] {
        fs::create_dir_all(layer.join(sub))?;
    }
    chown(layer.join("etc"), Some(uid), Some(gid))?;
    fs::set_permissions(layer.join("etc"), fs::Permissions::from_mode(mode))?;
    for file in INIT_LAYER_FILES.iter().rev() {
        fs::write(layer.join(file), "")?;
    }
    Ok(layer)
}

/// Those that are shown to containers; the first says that a layer is whole.
const INIT_LAYER_FILES: [&str; 4] = [".dockerenv", "etc/hosts", "etc/hostname", "etc/resolv.conf"];

/// A program that runs somewhere cannot be written; it is the one we would write.
fn busy(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::ExecutableFileBusy { Ok(()) } else { Err(error) }
}
