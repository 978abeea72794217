//! Making a container: what its image adds to what it is asked to be, and what it is called.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::container::Record;
use super::{Container, Engine, EngineError, disk_error, make_dir, now};
use crate::container::config::{ContainerConfig, ContainerMount, MountSource, NamespaceMode, NetworkMode};
use crate::container::id_map::IdMap;
use crate::container::state::ContainerState;
use crate::container::targets;
use crate::image::store::Image;
use crate::sys;
use crate::volume::Volume;

impl Engine {
    /// Makes a container; its image must be here.
    pub fn create(&self, mut config: ContainerConfig) -> Result<String, EngineError> {
        let image = self.images.find(&config.image).ok_or_else(|| EngineError::NoImage(config.image.clone()))?;
        config.image_id.clone_from(&image.id);
        merge_image(&mut config, &image);
        config.no_new_privileges.get_or_insert(self.config.no_new_privileges);
        self.create_on(config, image.layers)
    }

    /// Makes a container whose file system is made of `layers`.
    pub(crate) fn create_on(&self, mut config: ContainerConfig, layers: Vec<String>) -> Result<String, EngineError> {
        for mount in &config.mounts {
            targets::check(mount).map_err(EngineError::Invalid)?;
        }
        for payload in &config.payloads {
            targets::check_file(&payload.target).map_err(EngineError::Invalid)?;
        }
        self.config.defaults.apply(&mut config);
        config.id_map = self.choose_id_map(&config)?;
        config.storage = self.storage;
        if config.command().is_empty() {
            return Err(EngineError::Invalid("no command specified: give one, as the image names none".into()));
        }
        if config.hostname.is_empty() {
            config.hostname = self.shared_hostname(&config);
        }
        for mount in &mut config.mounts {
            if let MountSource::Image { image, image_id, layers, .. } = &mut mount.source {
                // Not as one that the container stands on: clients would fetch that.
                let missing =
                    || format!("invalid mount config for type \"image\": No such image: {image}: pull it first");
                let found = self.images.find(image).ok_or_else(|| EngineError::Invalid(missing()))?;
                (*image_id, *layers) = (found.id, found.layers);
            }
        }
        let id = hex::encode(rand::random::<[u8; 32]>());
        for own in [&mut config.hostname, &mut config.name] {
            if own.is_empty() {
                id[..12].clone_into(own);
            }
        }
        let dirs = self.dirs(&id, &config);
        make_dir(&dirs.data)?;
        make_dir(&dirs.run)?;
        for mount in &mut config.mounts {
            if let MountSource::Volume { name, labels, options, .. } = &mut mount.source {
                let volume = Volume {
                    name: name.clone(),
                    labels: labels.clone(),
                    options: options.clone(),
                    ..Volume::default()
                };
                *name = self.create_volume(volume)?.name;
            }
        }
        let record = Record {
            config,
            layers,
            created: now(),
            state: ContainerState::Created,
            stopped_by_hand: false,
            restarts: 0,
        };
        let container = Arc::new(Container::from_record(id.clone(), dirs, record));
        {
            let mut containers = self.lock();
            let name = container.name();
            if let Some(other) = containers.values().find(|other| other.name() == name) {
                let taken = EngineError::NameTaken { name, id: other.id.clone() };
                container.dirs.remove().map_err(disk_error("removing a container's directories"))?;
                return Err(taken);
            }
            containers.insert(id.clone(), container.clone());
        }
        if let Err(error) = container.save() {
            self.lock().remove(&id);
            // The first error is the one to tell.
            let _ = container.dirs.remove();
            return Err(disk_error(format!("saving container {id}"))(error));
        }
        self.tell_container(&container, "create", &[]);
        Ok(id)
    }

    /// The name of whose network or names a container shares, as far as that one is there yet; empty: it has its own.
    fn shared_hostname(&self, config: &ContainerConfig) -> String {
        match &config.network {
            NetworkMode::Container(id) => {
                self.find(id).map_or_else(|_| String::new(), |peer| peer.config().hostname.clone())
            }
            NetworkMode::Host => sys::host_name(),
            _ if config.uts_mode == NamespaceMode::Host => sys::host_name(),
            _ => String::new(),
        }
    }

    /// How the users of a new container become users of the host.
    /// What lies at `path` below the data directory, as a container made so may see it.
    pub(crate) fn view_for(&self, config: &ContainerConfig, path: &Path) -> Result<PathBuf, EngineError> {
        let shift = self.choose_id_map(config)?.map(|map| self.shift(map));
        Ok(shift.map_or_else(|| path.to_owned(), |shift| shift.view(path)))
    }

    fn choose_id_map(&self, config: &ContainerConfig) -> Result<Option<IdMap>, EngineError> {
        let Some(map) = self.config.id_map.as_ref().filter(|_| !config.host_users) else { return Ok(None) };
        let why = if config.privileged {
            "privileged mode is incompatible with user namespaces: a privileged container needs --userns=host"
        } else if config.network == NetworkMode::Host {
            "cannot share the host's network namespace when user namespaces are enabled: use --userns=host with it"
        } else if config.pid_mode == NamespaceMode::Host {
            "cannot share the host PID namespace when user namespaces are enabled: use --userns=host with it"
        } else {
            return Ok(Some(map.clone()));
        };
        Err(EngineError::Invalid(why.into()))
    }
}

/// Fills in from the image what the configuration leaves open.
fn merge_image(config: &mut ContainerConfig, image: &Image) {
    let own = &image.config;
    if config.entrypoint.is_empty() {
        config.entrypoint.clone_from(&own.entrypoint);
        if config.args.is_empty() {
            config.args.clone_from(&own.cmd);
        }
    } else if config.entrypoint == [""] {
        // Said so that the image's own is not taken.
        config.entrypoint.clear();
    }
    let name_of = |var: &String| var.split('=').next().unwrap_or_default().to_owned();
    let set: BTreeSet<_> = config.env.iter().map(name_of).collect();
    let inherited = own.env.iter().filter(|var| !set.contains(&name_of(var)));
    // A name alone takes the image's variable away; it stays to be seen.
    config.env = inherited.chain(&config.env).cloned().collect();
    config.exposed_ports.extend(own.exposed_ports.keys().cloned());
    config.exposed_ports.sort();
    config.exposed_ports.dedup();
    for (field, from) in [
        (&mut config.working_dir, &own.working_dir),
        (&mut config.user, &own.user),
        (&mut config.stop_signal, &own.stop_signal),
    ] {
        if field.is_empty() {
            field.clone_from(from);
        }
    }
    for (key, value) in &own.labels {
        config.labels.entry(key.clone()).or_insert_with(|| value.clone());
    }
    for target in own.volumes.keys() {
        let target = format!("/{}", crate::build::clean(target).display());
        if !config.mounts.iter().any(|mount| mount.target == target) {
            config.mounts.push(ContainerMount {
                source: MountSource::Volume {
                    name: String::new(),
                    labels: BTreeMap::new(),
                    options: BTreeMap::new(),
                    no_copy: false,
                    subpath: String::new(),
                },
                target,
                read_only: false,
            });
        }
    }
}
