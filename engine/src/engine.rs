//! The engine as its users see it.

mod lifecycle;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use skep_api::Timestamp;
use tokio::sync::{broadcast, mpsc, watch};
use tokio_util::task::TaskTracker;

use crate::container::config::{ContainerConfig, MountSource};
use crate::container::logs::{self, LogOptions, LogStream};
use crate::container::rootfs::ContainerDirs;
use crate::container::state::{ContainerState, Exit};
use crate::disk;
use crate::image::pull::{Credentials, PullError, PullProgress, Puller, RegistryConfig, Resolved};
use crate::image::store::{Image, ImageStore, Removal};
use crate::image::{builtin, familiar};
use crate::network::{Bridge, BridgeConfig, NetworkKeeper};
use crate::volume::{Volume, VolumeStore};

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
    pub bridge: BridgeConfig,
    pub registries: RegistryConfig,
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
            bridge: BridgeConfig::default(),
            registries: RegistryConfig::default(),
        }
    }

    /// Puts the bridge network at `gateway/prefix_len`.
    pub fn set_bridge(&mut self, gateway: std::net::Ipv4Addr, prefix_len: u8) {
        self.bridge.gateway = gateway;
        self.bridge.prefix_len = prefix_len;
    }
}

/// Why the engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("no such container: {0}")]
    NoContainer(String),
    #[error("no such image: {0}")]
    NoImage(String),
    #[error("the name {name:?} is in use by container {id}: remove or rename that one")]
    NameTaken { name: String, id: String },
    #[error("container {id} is {found}, it must be {wanted}")]
    WrongState { id: String, found: &'static str, wanted: &'static str },
    #[error("image {image} is used by container {container}: remove that first")]
    ImageInUse { image: String, container: String },
    #[error("container {id} could not be started: {reason}")]
    Start { id: String, reason: String },
    #[error("{0:?} is no signal")]
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
    pub log_path: PathBuf,
}

/// One container.
pub(crate) struct Container {
    id: String,
    config: Arc<ContainerConfig>,
    layers: Vec<String>,
    created: Timestamp,
    dirs: ContainerDirs,
    state: watch::Sender<ContainerState>,
    /// One operation at a time.
    operation: tokio::sync::Mutex<()>,
    /// Held by everybody who reads the output.
    readers: Arc<()>,
}

/// A container on disk.
#[derive(Serialize, Deserialize)]
struct Record {
    config: ContainerConfig,
    layers: Vec<String>,
    created: Timestamp,
    state: ContainerState,
}

impl Container {
    fn save(&self) -> io::Result<()> {
        let record = Record {
            config: (*self.config).clone(),
            layers: self.layers.clone(),
            created: self.created,
            state: self.state.borrow().clone(),
        };
        disk::write_whole(&self.dirs.data.join("container.json"), &serde_json::to_vec_pretty(&record)?)
    }

    fn inspection(&self) -> Inspection {
        Inspection {
            id: self.id.clone(),
            config: self.config.clone(),
            created: self.created,
            state: self.state.borrow().clone(),
            log_path: self.dirs.log(),
        }
    }
}

/// The containers and images of one host.
pub struct Engine {
    config: EngineConfig,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    images: Arc<ImageStore>,
    puller: Puller,
    volumes: VolumeStore,
    bridge: Bridge,
    keeper: Mutex<Option<Arc<dyn NetworkKeeper>>>,
    events: broadcast::Sender<EngineEvent>,
    tasks: TaskTracker,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("data_dir", &self.config.data_dir).finish_non_exhaustive()
    }
}

/// Events a slow listener may fall behind before it misses some.
const EVENTS_KEPT: usize = 1024;

pub(crate) fn now() -> Timestamp {
    Timestamp::from_system(SystemTime::now())
}

impl Engine {
    /// Opens the engine and takes up the containers that are there, running or not.
    pub fn open(config: EngineConfig) -> Result<Arc<Self>, EngineError> {
        for dir in ["containers", "bin"] {
            make_dir(&config.data_dir.join(dir))?;
        }
        make_dir(&config.run_dir.join("containers"))?;
        let images =
            Arc::new(ImageStore::open(&config.data_dir.join("image")).map_err(disk_error("opening the image store"))?);
        builtin::ensure(&images).map_err(disk_error("storing the built-in image"))?;
        builtin::install(&config.data_dir.join("bin/skep-init"))
            .or_else(busy)
            .map_err(disk_error("storing skep-init"))?;
        let engine = Arc::new(Self {
            puller: Puller::new(config.registries.clone(), images.clone()),
            volumes: VolumeStore::open(&config.data_dir.join("volumes")).map_err(disk_error("opening the volumes"))?,
            bridge: Bridge::new(config.bridge.clone(), &config.run_dir).map_err(disk_error("preparing the network"))?,
            keeper: Mutex::default(),
            containers: Mutex::default(),
            images,
            events: broadcast::channel(EVENTS_KEPT).0,
            tasks: TaskTracker::new(),
            config,
        });
        engine.adopt_all()?;
        Ok(engine)
    }

    fn dirs(&self, id: &str) -> ContainerDirs {
        ContainerDirs {
            data: self.config.data_dir.join("containers").join(id),
            run: self.config.run_dir.join("containers").join(id),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Container>>> {
        self.containers.lock().expect("nobody panics while holding it")
    }

    /// Finds a container by id, name, or the beginning of its id.
    fn find(&self, name: &str) -> Result<Arc<Container>, EngineError> {
        let containers = self.lock();
        let bare = name.strip_prefix('/').unwrap_or(name);
        let exact = containers.get(bare).or_else(|| containers.values().find(|c| c.config.name == bare));
        let found = exact.cloned().or_else(|| {
            let mut matching = containers.range(bare.to_owned()..).take_while(|(id, _)| id.starts_with(bare));
            let first = matching.next().filter(|_| !bare.is_empty());
            first.filter(|_| matching.next().is_none()).map(|(_, container)| container.clone())
        });
        found.ok_or_else(|| EngineError::NoContainer(name.to_owned()))
    }

    fn tell(&self, kind: &'static str, action: &str, id: &str, attributes: BTreeMap<String, String>) {
        let event = EngineEvent { kind, action: action.to_owned(), id: id.to_owned(), attributes, at: now() };
        // Nobody listening is no error.
        drop(self.events.send(event));
    }

    fn tell_container(&self, container: &Container, action: &str, more: &[(&str, String)]) {
        let mut attributes = container.config.labels.clone();
        attributes.insert("image".into(), familiar(&container.config.image).to_owned());
        attributes.insert("name".into(), container.config.name.clone());
        attributes.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        self.tell("container", action, &container.id, attributes);
    }

    /// What happens from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<EngineEvent> {
        self.events.subscribe()
    }

    /// Makes a container; its image must be here.
    pub fn create(&self, mut config: ContainerConfig) -> Result<String, EngineError> {
        let image = self.images.find(&config.image).ok_or_else(|| EngineError::NoImage(config.image.clone()))?;
        let id = hex::encode(rand::random::<[u8; 32]>());
        config.image_id.clone_from(&image.id);
        merge_image(&mut config, &image, &id);
        config.no_new_privileges.get_or_insert(self.config.no_new_privileges);
        let dirs = self.dirs(&id);
        make_dir(&dirs.data)?;
        make_dir(&dirs.run)?;
        for mount in &mut config.mounts {
            if let MountSource::Volume { name, labels, .. } = &mut mount.source {
                let anonymous = name.is_empty();
                if anonymous {
                    *name = hex::encode(rand::random::<[u8; 32]>());
                }
                let volume = Volume { name: name.clone(), labels: labels.clone(), created: now(), anonymous };
                self.volumes.ensure(&volume).map_err(disk_error(format!("making volume {name}")))?;
            }
        }
        let container = Arc::new(Container {
            id: id.clone(),
            layers: image.layers,
            created: now(),
            dirs,
            state: watch::channel(ContainerState::Created).0,
            operation: tokio::sync::Mutex::default(),
            readers: Arc::default(),
            config: Arc::new(config),
        });
        {
            let mut containers = self.lock();
            let name = &container.config.name;
            if let Some(other) = containers.values().find(|other| other.config.name == *name) {
                let taken = EngineError::NameTaken { name: name.clone(), id: other.id.clone() };
                container.dirs.remove().map_err(disk_error("removing a container's directories"))?;
                return Err(taken);
            }
            containers.insert(id.clone(), container.clone());
        }
        container.save().map_err(disk_error(format!("saving container {id}")))?;
        self.tell_container(&container, "create", &[]);
        Ok(id)
    }

    pub fn inspect(&self, name: &str) -> Result<Inspection, EngineError> {
        Ok(self.find(name)?.inspection())
    }

    /// All containers, in the order of their ids.
    #[must_use]
    pub fn list(&self) -> Vec<Inspection> {
        self.lock().values().map(|container| container.inspection()).collect()
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

    /// Reads a container's output.
    pub fn logs(&self, name: &str, options: LogOptions) -> Result<LogStream, EngineError> {
        let container = self.find(name)?;
        let (state, reading) = (container.state.subscribe(), container.readers.clone());
        let ended = move || {
            // As long as this is asked, somebody reads.
            let _ = &reading;
            match &*state.borrow() {
                ContainerState::Running(_) | ContainerState::Created => state.has_changed().is_err(),
                ContainerState::Exited(_) => true,
            }
        };
        Ok(logs::read(container.dirs.log(), options, ended))
    }

    #[must_use]
    pub fn images(&self) -> Vec<Image> {
        self.images.list()
    }

    pub fn image(&self, name: &str) -> Result<Image, EngineError> {
        self.images.find(name).ok_or_else(|| EngineError::NoImage(name.to_owned()))
    }

    /// Pulls an image; progress goes to `progress` as far as somebody takes it.
    pub async fn pull(
        &self,
        name: &str,
        credentials: &Credentials,
        progress: &mpsc::Sender<PullProgress>,
    ) -> Result<Image, EngineError> {
        let image = self.puller.pull(name, credentials, progress).await?;
        self.tell("image", "pull", name, BTreeMap::from([("name".to_owned(), familiar(name).to_owned())]));
        Ok(image)
    }

    /// Asks the registry what a name stands for.
    pub async fn resolve(&self, name: &str, credentials: &Credentials) -> Result<Resolved, EngineError> {
        Ok(self.puller.resolve(name, credentials).await?)
    }

    /// Takes a name off an image, and the image away with its last name.
    pub fn remove_image(&self, name: &str) -> Result<Removal, EngineError> {
        let image = self.image(name)?;
        let containers = self.lock();
        let user = containers.values().find(|container| container.config.image_id == image.id);
        if let Some(user) = user
            && image.tags.len() <= 1
        {
            return Err(EngineError::ImageInUse { image: name.to_owned(), container: user.id.clone() });
        }
        let in_use: BTreeSet<String> = containers.values().flat_map(|container| container.layers.clone()).collect();
        let removal =
            self.images.remove(name, &image, &in_use).map_err(disk_error(format!("removing image {name}")))?;
        drop(containers);
        self.tell("image", "delete", &image.id, BTreeMap::new());
        Ok(removal)
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

/// A program that runs somewhere cannot be written; it is the one we would write.
fn busy(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::ExecutableFileBusy { Ok(()) } else { Err(error) }
}

/// Fills in from the image what the configuration leaves open.
fn merge_image(config: &mut ContainerConfig, image: &Image, id: &str) {
    let own = &image.config;
    if config.entrypoint.is_empty() {
        config.entrypoint.clone_from(&own.entrypoint);
        if config.args.is_empty() {
            config.args.clone_from(&own.cmd);
        }
    }
    let name_of = |var: &String| var.split('=').next().unwrap_or_default().to_owned();
    let set: BTreeSet<_> = config.env.iter().map(name_of).collect();
    let inherited = own.env.iter().filter(|var| !set.contains(&name_of(var)));
    config.env = inherited.chain(&config.env).cloned().collect();
    for (field, from) in [
        (&mut config.working_dir, &own.working_dir),
        (&mut config.user, &own.user),
        (&mut config.stop_signal, &own.stop_signal),
    ] {
        if field.is_empty() {
            field.clone_from(from);
        }
    }
    if config.hostname.is_empty() {
        config.hostname = id[..12].to_owned();
    }
    if config.name.is_empty() {
        config.name = id[..12].to_owned();
    }
    for (key, value) in &own.labels {
        config.labels.entry(key.clone()).or_insert_with(|| value.clone());
    }
    for target in own.volumes.keys() {
        if !config.mounts.iter().any(|mount| mount.target == *target) {
            config.mounts.push(crate::container::config::ContainerMount {
                source: MountSource::Volume { name: String::new(), labels: BTreeMap::new(), no_copy: false },
                target: target.clone(),
                read_only: false,
            });
        }
    }
}
