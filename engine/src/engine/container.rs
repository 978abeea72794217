//! One container as the engine holds it, and as it is kept on disk.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use skep_api::Timestamp;
use tokio::sync::{oneshot, watch};

use super::lifecycle::start_ticks;
use super::{Attachment, Inspection};
use crate::container::config::{ContainerConfig, MountSource, RestartPolicy};
use crate::container::logs::config::FileFormat;
use crate::container::restart::RestartBackoff;
use crate::container::rootfs::ContainerDirs;
use crate::container::state::ContainerState;
use crate::disk;

/// A health check's result.
#[derive(Clone, Debug)]
pub struct Probe {
    pub started_at: Timestamp,
    pub ended_at: Timestamp,
    /// 0: it passed; -1: it could not run.
    pub code: i32,
    pub output: String,
}

/// Probes that are remembered of each container.
const PROBES_KEPT: usize = 5;

/// One container.
pub(crate) struct Container {
    pub(super) id: String,
    /// Replaced as a whole when it is renamed or updated.
    pub(super) config: Mutex<Arc<ContainerConfig>>,
    pub(super) layers: Vec<String>,
    pub(super) created: Timestamp,
    pub(super) dirs: ContainerDirs,
    pub(super) state: watch::Sender<ContainerState>,
    /// One operation at a time.
    pub(super) operation: Arc<tokio::sync::Mutex<()>>,
    /// Held by everybody who reads the output.
    pub(super) readers: Arc<()>,
    /// Those who are attached before it starts.
    pub(super) waiting: Mutex<Vec<oneshot::Sender<Attachment>>>,
    /// Whether a user ended it: what is stopped by hand is not started again.
    pub(super) stopped_by_hand: AtomicBool,
    /// Whether its process is gone, and what it had is being taken down.
    pub(super) ended: AtomicBool,
    /// Whether it is ended only to be started again at once.
    pub(super) restarting_by_hand: AtomicBool,
    pub(super) backoff: Mutex<RestartBackoff>,
    pub(super) restarts: AtomicU32,
    pub(super) probes: Mutex<(u32, VecDeque<Probe>)>,
}

/// A container on disk.
#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) config: ContainerConfig,
    pub(super) layers: Vec<String>,
    pub(super) created: Timestamp,
    pub(super) state: ContainerState,
    #[serde(default)]
    pub(super) stopped_by_hand: bool,
    #[serde(default)]
    pub(super) restarts: u32,
}

impl Container {
    pub(super) fn from_record(id: String, dirs: ContainerDirs, record: Record) -> Self {
        Self {
            id,
            config: Mutex::new(Arc::new(record.config)),
            layers: record.layers,
            created: record.created,
            dirs,
            state: watch::channel(record.state).0,
            operation: Arc::default(),
            readers: Arc::default(),
            waiting: Mutex::default(),
            stopped_by_hand: record.stopped_by_hand.into(),
            ended: false.into(),
            restarting_by_hand: false.into(),
            backoff: Mutex::default(),
            restarts: record.restarts.into(),
            probes: Mutex::default(),
        }
    }

    pub(super) fn config(&self) -> Arc<ContainerConfig> {
        self.config.lock().expect("nobody panics while holding it").clone()
    }

    pub(super) fn name(&self) -> String {
        self.config().name.clone()
    }

    pub(super) fn save(&self) -> io::Result<()> {
        disk::write_whole(&self.dirs.data.join("container.json"), &self.record()?)
    }

    /// Writes down where it stands. The host's crash ends it anyway; only one that is to be started
    /// again has to be remembered then.
    pub(super) fn save_state(&self) -> io::Result<()> {
        if self.config().restart != RestartPolicy::No {
            return self.save();
        }
        disk::write_passing(&self.dirs.data.join("container.json"), &self.record()?)
    }

    /// As [`save_state`](Self::save_state), where nothing is to fail because the disk is full.
    pub(super) fn try_save_state(&self) {
        if let Err(error) = self.save_state() {
            tracing::error!(container = %self.id, %error, "where a container stands could not be saved");
        }
    }

    fn record(&self) -> io::Result<Vec<u8>> {
        let record = Record {
            config: (*self.config()).clone(),
            layers: self.layers.clone(),
            created: self.created,
            state: self.state.borrow().clone(),
            stopped_by_hand: self.stopped_by_hand.load(Ordering::Relaxed),
            restarts: self.restarts.load(Ordering::Relaxed),
        };
        Ok(serde_json::to_vec_pretty(&record)?)
    }

    /// The layers that it needs: its root's, and those of the images that it shows.
    pub(super) fn held_layers(&self) -> Vec<String> {
        let config = self.config();
        let shown = config.mounts.iter().flat_map(|mount| match &mount.source {
            MountSource::Image { layers, .. } => layers.as_slice(),
            MountSource::Bind { .. } | MountSource::Volume { .. } | MountSource::Tmpfs { .. } => &[],
        });
        self.layers.iter().chain(shown).cloned().collect()
    }

    /// Whether its first process is there; the state may not tell yet that it is gone.
    pub(super) fn is_alive(&self) -> bool {
        matches!(&*self.state.borrow(), ContainerState::Running(running) if start_ticks(running.pid).is_some())
    }

    pub(super) fn is_paused(&self) -> bool {
        matches!(&*self.state.borrow(), ContainerState::Running(running) if running.paused)
    }

    pub(super) fn keep_probe(&self, probe: Probe, failing_streak: u32) {
        let mut probes = self.probes.lock().expect("nobody panics while holding it");
        probes.0 = failing_streak;
        probes.1.push_back(probe);
        if probes.1.len() > PROBES_KEPT {
            probes.1.pop_front();
        }
    }

    pub(super) fn inspection(&self, execs: Vec<String>) -> Inspection {
        let (failing_streak, probes) = self.probes.lock().expect("nobody panics while holding it").clone();
        let log_format = self.config().log.kept();
        Inspection {
            id: self.id.clone(),
            config: self.config(),
            created: self.created,
            state: self.state.borrow().clone(),
            log_path: log_format.filter(|&format| format == FileFormat::Json).map(|format| self.dirs.log(format)),
            data_dir: self.dirs.data.clone(),
            layer_dirs: Vec::new(),
            netns: None,
            restarts: self.restarts.load(Ordering::Relaxed),
            probes: probes.into(),
            failing_streak,
            execs,
        }
    }
}
