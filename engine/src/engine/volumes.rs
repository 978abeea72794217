//! Volumes and who uses them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::launch::populate_volumes;
use super::{Container, Engine, EngineError, disk_error, now};
use crate::container::config::{ContainerConfig, MountSource};
use crate::container::state::ContainerState;
use crate::disk;
use crate::volume::{self, Volume};

impl Engine {
    /// Makes a volume, or finds the one of that name; no name: a new one.
    pub fn create_volume(&self, mut volume: Volume) -> Result<Volume, EngineError> {
        if volume.name.is_empty() {
            volume.name = hex::encode(rand::random::<[u8; 32]>());
            volume.anonymous = true;
        }
        volume.created = now();
        if self.volumes.ensure(&volume)? {
            self.tell_volume("create", &volume.name);
        }
        self.volume(&volume.name)
    }

    /// Gives the empty volumes of a container that is new what its image has in their place. One that is only made for its
    /// volumes may never start.
    pub async fn fill_volumes(self: &Arc<Self>, id: &str) -> Result<(), EngineError> {
        let container = self.find(id)?;
        let config = container.config();
        let mut empty = config.mounts.iter().filter(|mount| match &mount.source {
            MountSource::Volume { name, no_copy: false, .. } => {
                // What has options is not mounted before it is used, and filled then.
                let plain = self.volumes.get(name).is_some_and(|volume| volume.options.is_empty());
                // One that cannot be read says so when it is used.
                plain && volume::is_empty(&self.volumes.data_dir(name)).unwrap_or(false)
            }
            MountSource::Volume { .. }
            | MountSource::Bind { .. }
            | MountSource::Tmpfs { .. }
            | MountSource::Image { .. } => false,
        });
        let Some(first) = empty.next() else { return Ok(()) };
        let layers = self.layer_dirs(&container.layers).map_err(disk_error("finding an image's layers"))?;
        if !std::iter::once(first).chain(empty).any(|mount| may_have(&layers, &mount.target)) {
            return Ok(());
        }
        let _one = container.operation.clone().lock_owned().await;
        if container.require_running().is_ok() {
            // Its name was heard of, and it was filled when it started.
            return Ok(());
        }
        let engine = self.clone();
        let filled = tokio::task::spawn_blocking(move || {
            let _mounted = engine.mounted(&container)?;
            let names = volume_names(&config);
            let dirs = names.map(|name| (name.to_owned(), container.dirs.view(&engine.volumes.data_dir(name))));
            let dirs = dirs.collect();
            let root = container.dirs.rootfs();
            let filled = container.dirs.as_root(|| populate_volumes(&config, &root, &dirs));
            filled.map_err(disk_error(format!("filling the volumes of container {}", container.id)))
        });
        filled.await.map_err(io::Error::other).map_err(disk_error("filling volumes"))?
    }

    fn tell_volume(&self, action: &str, name: &str) {
        self.tell("volume", action, name, BTreeMap::from([("driver".to_owned(), "local".to_owned())]));
    }

    /// Tells that a container has its volumes mounted, or has them no more.
    pub(super) fn tell_volumes(&self, action: &str, container: &Container) {
        let config = container.config();
        for mount in &config.mounts {
            let MountSource::Volume { name, .. } = &mount.source else { continue };
            let attributes = [
                ("driver", "local".to_owned()),
                ("container", container.id.clone()),
                ("destination", mount.target.clone()),
                ("read/write", (!mount.read_only).to_string()),
            ];
            self.tell("volume", action, name, attributes.map(|(key, value)| (key.to_owned(), value)).into());
        }
    }

    /// All volumes, by name.
    #[must_use]
    pub fn volumes(&self) -> Vec<Volume> {
        self.volumes.list()
    }

    pub fn volume(&self, name: &str) -> Result<Volume, EngineError> {
        self.volumes.get(name).ok_or_else(|| EngineError::NoVolume(name.to_owned()))
    }

    /// Where a volume's data lies.
    #[must_use]
    pub fn volume_dir(&self, name: &str) -> PathBuf {
        self.volumes.data_dir(name)
    }

    /// The ids of the containers that have the volume.
    #[must_use]
    pub fn volume_users(&self, name: &str) -> Vec<String> {
        let containers = self.lock();
        let users = containers.values().filter(|container| volume_names(&container.config()).any(|used| used == name));
        users.map(|container| container.id.clone()).collect()
    }

    pub fn remove_volume(&self, name: &str) -> Result<(), EngineError> {
        let volume = self.volume(name)?;
        if let Some(container) = self.volume_users(name).first() {
            return Err(EngineError::Conflict(format!(
                "remove {name}: volume is in use - [{container}]: remove that container first"
            )));
        }
        self.volumes.remove(&volume.name).map_err(disk_error(format!("removing volume {name}")))?;
        self.tell_volume("destroy", name);
        Ok(())
    }

    /// Removes the volumes that nobody uses and `wanted` says; returns their names and the bytes that
    /// are free now.
    pub fn prune_volumes(&self, wanted: impl Fn(&Volume) -> bool) -> (Vec<String>, u64) {
        let (mut names, mut bytes) = (Vec::new(), 0);
        for volume in self.volumes().into_iter().filter(|volume| wanted(volume)) {
            let size = disk::usage(&self.volumes.data_dir(&volume.name));
            // One that came into use meanwhile stays.
            if self.volume_users(&volume.name).is_empty() && self.remove_volume(&volume.name).is_ok() {
                names.push(volume.name);
                bytes += size;
            }
        }
        (names, bytes)
    }

    /// Bytes on disk of one volume.
    #[must_use]
    pub fn volume_size(&self, name: &str) -> u64 {
        disk::usage(&self.volumes.data_dir(name))
    }

    /// Removes the volumes that were made for one container alone.
    pub(super) fn remove_nameless_volumes(&self, config: &ContainerConfig) {
        for name in volume_names(config) {
            let nameless = self.volumes.get(name).is_some_and(|volume| volume.anonymous);
            if nameless
                && self.volume_users(name).is_empty()
                && let Err(error) = self.remove_volume(name)
            {
                tracing::warn!(volume = name, %error, "a volume was not removed with its container");
            }
        }
    }

    /// Takes down mounts of volumes that no running container but `config`'s own uses.
    pub(super) fn unmount_volumes(&self, id: &str, config: &ContainerConfig) {
        let others: Vec<_> = {
            let containers = self.lock();
            let running = containers.values().filter(|container| {
                container.id != id && matches!(&*container.state.borrow(), ContainerState::Running(_))
            });
            running.map(|container| container.config()).collect()
        };
        for name in volume_names(config) {
            let used = others.iter().any(|config| volume_names(config).any(|used| used == name));
            if !used && let Err(error) = self.volumes.unmount(name) {
                tracing::warn!(volume = name, %error, "a volume was not unmounted");
            }
        }
    }
}

/// Whether layers may have something in a directory; where links lead is not looked at.
fn may_have(layers: &[PathBuf], target: &str) -> bool {
    let inside = Path::new(target.trim_start_matches('/'));
    layers.iter().any(|layer| {
        let led = inside.ancestors().any(|part| layer.join(part).is_symlink());
        led || fs::read_dir(layer.join(inside)).is_ok_and(|mut entries| entries.next().is_some())
    })
}

pub(super) fn volume_names(config: &ContainerConfig) -> impl Iterator<Item = &str> {
    config.mounts.iter().filter_map(|mount| match &mount.source {
        MountSource::Volume { name, .. } => Some(name.as_str()),
        MountSource::Bind { .. } | MountSource::Tmpfs { .. } | MountSource::Image { .. } => None,
    })
}
