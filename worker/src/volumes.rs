//! Volumes of the swarm on this node: brings those that the managers assign to where tasks find them, and takes them away
//! again once the managers say so and no container uses them.
//!
//! Each volume has a task of its own, which asks the node's side of the storage driver until that has done it. What was
//! brought is written down first, so that a daemon that comes back can take it away, too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use skep_api::grpc::VolumesReleased;
use skep_api::volume::{NodeCsiInfo, VolumeAssignment, VolumeAttachment};
use skep_api::{VolumeId, encoding};
use skep_csi::Drivers;
use skep_engine::{ContainerState, Engine, MountSource};
use tokio::sync::{Notify, watch};

/// Pauses between attempts: the first, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// How long a task's start waits for its volumes.
const READY_LIMIT: Duration = Duration::from_secs(300);
/// How often containers are looked at that still use a volume which is to go.
const USERS_PAUSE: Duration = Duration::from_millis(100);
/// How often the drivers are asked what they say of this node.
const DRIVERS_PAUSE: Duration = Duration::from_secs(2);
/// The same of one that has answered: what it says changes hardly ever.
const DRIVER_PAUSE: Duration = Duration::from_secs(60);
/// In the directory of a volume: what it is, where its driver keeps it, and where tasks find it.
const RECORD: &str = "assignment";
const STAGING: &str = "staging";
const MOUNT: &str = "mount";

/// The volumes of the swarm that are here, or on their way.
#[derive(Clone, Debug)]
pub struct Volumes(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    engine: Arc<Engine>,
    drivers: Drivers,
    dir: PathBuf,
    /// What each is to be: here, or gone.
    wanted: Mutex<BTreeMap<VolumeId, watch::Sender<Wish>>>,
    states: watch::Sender<BTreeMap<VolumeId, State>>,
    /// Those that the managers are still to hear of.
    released: Mutex<BTreeSet<VolumeId>>,
    news: Notify,
    here: watch::Sender<Vec<NodeCsiInfo>>,
}

#[derive(Clone, Debug, PartialEq)]
enum Wish {
    Here(Box<VolumeAssignment>),
    Gone,
}

/// How far a volume is that is to be here.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// With the reason of the last attempt that failed.
    Coming(String),
    Here,
}

impl Volumes {
    /// Volumes below `dir`. What an earlier daemon brought there stays until the managers say what is to become of it.
    #[must_use]
    pub fn new(engine: Arc<Engine>, drivers: Drivers, dir: PathBuf) -> Self {
        Self(Arc::new(Inner {
            engine,
            drivers,
            dir,
            wanted: Mutex::default(),
            states: watch::Sender::default(),
            released: Mutex::default(),
            news: Notify::new(),
            here: watch::Sender::default(),
        }))
    }

    fn wanted(&self) -> MutexGuard<'_, BTreeMap<VolumeId, watch::Sender<Wish>>> {
        self.0.wanted.lock().expect("nobody panics while holding it")
    }

    fn released(&self) -> MutexGuard<'_, BTreeSet<VolumeId>> {
        self.0.released.lock().expect("nobody panics while holding it")
    }

    /// Takes what the managers say; a complete set names all that are to be here.
    pub(crate) fn apply(&self, complete: bool, assigned: Vec<VolumeAssignment>, removed: &[VolumeId]) {
        let mut gone: BTreeSet<VolumeId> = removed.iter().copied().collect();
        if complete {
            gone.extend(self.wanted().keys().copied());
            gone.extend(self.left_over());
            gone.retain(|id| assigned.iter().all(|volume| volume.id != *id));
        }
        for id in gone {
            self.want(id, Wish::Gone);
        }
        for volume in assigned {
            self.want(volume.id, Wish::Here(Box::new(volume)));
        }
    }

    fn want(&self, id: VolumeId, wish: Wish) {
        let mut wanted = self.wanted();
        if let Some(sender) = wanted.get(&id) {
            sender.send_if_modified(|before| {
                let changes = *before != wish;
                *before = wish;
                changes
            });
            return;
        }
        let (sender, wishes) = watch::channel(wish);
        wanted.insert(id, sender);
        drop(wanted);
        tokio::spawn(self.clone().keep(id, wishes));
    }

    /// Those that an earlier daemon brought.
    fn left_over(&self) -> Vec<VolumeId> {
        let Ok(entries) = std::fs::read_dir(&self.0.dir) else { return Vec::new() };
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    fn set_state(&self, id: VolumeId, state: Option<State>) {
        self.0.states.send_modify(|states| match state {
            Some(state) => drop(states.insert(id, state)),
            None => drop(states.remove(&id)),
        });
    }

    /// Does for one volume what is wished, until it is gone.
    async fn keep(self, id: VolumeId, mut wishes: watch::Receiver<Wish>) {
        let mut pause = BACKOFF.0;
        loop {
            let wish = wishes.borrow_and_update().clone();
            let done = match &wish {
                Wish::Here(volume) => self.bring(volume).await,
                Wish::Gone => {
                    self.set_state(id, None);
                    self.take_away(id).await
                }
            };
            match (done, wish) {
                (Ok(()), Wish::Here(_)) => {
                    self.set_state(id, Some(State::Here));
                    pause = BACKOFF.0;
                    if wishes.changed().await.is_err() {
                        return;
                    }
                }
                (Ok(()), Wish::Gone) => {
                    let mut wanted = self.wanted();
                    // Wanted again meanwhile.
                    if wishes.has_changed().unwrap_or(false) {
                        continue;
                    }
                    wanted.remove(&id);
                    drop(wanted);
                    self.released().insert(id);
                    self.0.news.notify_one();
                    return;
                }
                (Err(problem), wish) => {
                    tracing::warn!(volume = %id, problem, "a volume of the swarm is not where it should be; this is tried again");
                    if let Wish::Here(_) = wish {
                        self.set_state(id, Some(State::Coming(problem)));
                    }
                    tokio::select! {
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(BACKOFF.1),
                        changed = wishes.changed() => if changed.is_err() { return },
                    }
                }
            }
        }
    }

    fn dir_of(&self, id: VolumeId) -> PathBuf {
        self.0.dir.join(id.to_string())
    }

    async fn bring(&self, volume: &VolumeAssignment) -> Result<(), String> {
        let dir = self.dir_of(volume.id);
        let failed = |error: std::io::Error| format!("{}: {error}", dir.display());
        std::fs::create_dir_all(dir.join(STAGING)).map_err(failed)?;
        // What is secret is not needed to take it away.
        let record = VolumeAssignment { secrets: BTreeMap::new(), ..volume.clone() };
        // Whole or not at all, on a full disk too: without it nobody could take the volume away.
        skep_engine::write_whole(&dir.join(RECORD), &encoding::encode(&record)).map_err(failed)?;
        let driver = self.0.drivers.connect(&volume.driver).await.map_err(|error| error.to_string())?;
        let published = driver.node_publish(volume, &dir.join(STAGING), &dir.join(MOUNT)).await;
        published.map_err(|error| error.to_string())
    }

    async fn take_away(&self, id: VolumeId) -> Result<(), String> {
        let dir = self.dir_of(id);
        let failed = |error: std::io::Error| format!("{}: {error}", dir.display());
        let record = match std::fs::read(dir.join(RECORD)) {
            Ok(record) => record,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                // The daemon died before it wrote that down, or after it was taken away.
                return remove(&dir).map_err(failed);
            }
            Err(error) => return Err(failed(error)),
        };
        let volume: VolumeAssignment = encoding::decode(&record).map_err(|error| error.to_string())?;
        while self.is_used(&dir.join(MOUNT)) {
            tokio::time::sleep(USERS_PAUSE).await;
        }
        let driver = self.0.drivers.connect(&volume.driver).await.map_err(|error| error.to_string())?;
        let taken = driver.node_unpublish(&volume.volume_id, &dir.join(STAGING), &dir.join(MOUNT)).await;
        taken.map_err(|error| error.to_string())?;
        remove(&dir).map_err(failed)
    }

    /// Whether a container that runs shows what is there.
    fn is_used(&self, path: &Path) -> bool {
        self.0.engine.list().iter().any(|container| {
            let shows = |source: &MountSource| match source {
                MountSource::Bind { path: shown, .. } => Path::new(shown).starts_with(path),
                MountSource::Volume { .. } | MountSource::Tmpfs { .. } | MountSource::Image { .. } => false,
            };
            let devices =
                || container.config.devices.iter().any(|device| Path::new(&device.host_path).starts_with(path));
            matches!(container.state, ContainerState::Running(_))
                && (container.config.mounts.iter().any(|mount| shows(&mount.source)) || devices())
        })
    }

    /// Waits until a task's volumes are here. Where each is, by the target of its mount.
    pub(crate) async fn ready(&self, wanted: &[VolumeAttachment]) -> Result<BTreeMap<String, PathBuf>, String> {
        let mut states = self.0.states.subscribe();
        let all_here =
            states.wait_for(|states| wanted.iter().all(|volume| states.get(&volume.id) == Some(&State::Here)));
        let waited = tokio::time::timeout(READY_LIMIT, all_here).await.map(drop);
        if waited.is_ok() {
            let path = |volume: &VolumeAttachment| (volume.target.clone(), self.dir_of(volume.id).join(MOUNT));
            return Ok(wanted.iter().map(path).collect());
        }
        let states = self.0.states.borrow();
        let late = wanted.iter().find(|volume| states.get(&volume.id) != Some(&State::Here));
        let (source, why) = late.map_or(("", ""), |volume| {
            let why = match states.get(&volume.id) {
                Some(State::Coming(problem)) if !problem.is_empty() => problem.as_str(),
                _ => "the managers did not hand it to this node",
            };
            (volume.source.as_str(), why)
        });
        Err(format!("cluster volume {source} is not here after {} s: {why}", READY_LIMIT.as_secs()))
    }

    /// Takes all away, as far as that is done in time: this node leaves its swarm.
    pub async fn let_go(&self, limit: Duration) {
        self.apply(true, Vec::new(), &[]);
        let gone = async {
            while !self.wanted().is_empty() {
                tokio::time::sleep(USERS_PAUSE).await;
            }
        };
        if tokio::time::timeout(limit, gone).await.is_err() {
            let left: Vec<String> = self.wanted().keys().map(|&id| self.dir_of(id).display().to_string()).collect();
            tracing::warn!(dirs = left.join(", "), "volumes of the swarm could not be taken from this node");
        }
    }

    /// Waits until there is something to tell the managers.
    pub(crate) async fn next_released(&self) -> VolumesReleased {
        loop {
            let released = std::mem::take(&mut *self.released());
            if !released.is_empty() {
                return VolumesReleased { ids: released.iter().map(|id| id.to_bytes().to_vec()).collect() };
            }
            self.0.news.notified().await;
        }
    }

    /// What the storage drivers say of this node, as it is at any time.
    pub(crate) fn drivers(&self) -> watch::Receiver<Vec<NodeCsiInfo>> {
        self.0.here.subscribe()
    }

    /// Asks the drivers, those that come too, for as long as it is polled.
    pub(crate) async fn watch_drivers(&self) {
        let mut known: BTreeMap<String, (NodeCsiInfo, tokio::time::Instant)> = BTreeMap::new();
        loop {
            let names = self.0.drivers.names();
            known.retain(|name, _| names.contains(name));
            for name in names {
                if known.get(&name).is_some_and(|(_, at)| at.elapsed() < DRIVER_PAUSE) {
                    continue;
                }
                let asked = async { self.0.drivers.connect(&name).await?.node_info().await };
                match asked.await {
                    Ok(info) => drop(known.insert(name, (info, tokio::time::Instant::now()))),
                    Err(error) => {
                        tracing::debug!(%error, "a storage driver says nothing of this node");
                        known.remove(&name);
                    }
                }
            }
            let here: Vec<NodeCsiInfo> = known.values().map(|(info, _)| info.clone()).collect();
            self.0.here.send_if_modified(|before| {
                let changes = *before != here;
                *before = here;
                changes
            });
            tokio::time::sleep(DRIVERS_PAUSE).await;
        }
    }
}

/// Removes a volume's directory: nothing that is still on the volume, or mounted there, is touched.
fn remove(dir: &Path) -> std::io::Result<()> {
    // The record, and what a daemon that died left of writing it.
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(RECORD) {
            std::fs::remove_file(entry.path())?;
        }
    }
    for dir in [&dir.join(STAGING), &dir.join(MOUNT), dir] {
        match std::fs::remove_dir(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
