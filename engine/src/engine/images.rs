//! Images of one host, for its users.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};

use skep_api::Timestamp;
use tokio::sync::mpsc;

use super::{Container, Engine, EngineError, disk_error, now};
use crate::build::instruction;
use crate::image::builtin::{self, is_builtin};
use crate::image::pull::{Credentials, PullProgress, RegistryConfig, Resolved};
use crate::image::push::Pushed;
use crate::image::store::{ConfigBlob, HistoryEntry, Image, Removal};
use crate::image::{Platform, archive, familiar, normalize, repository, short};
use crate::turns::Turns;

/// One line of an image's history, the newest first.
#[derive(Clone, Debug)]
pub struct HistoryLine {
    /// The image's id for the newest; unknown for others.
    pub id: Option<String>,
    pub created: Timestamp,
    pub created_by: String,
    pub comment: String,
    pub size_bytes: u64,
    pub tags: Vec<String>,
}

/// What goes when somebody removes an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goes {
    All,
    NameAlone,
}

/// Refuses to remove an image that is in use, or that has several names of which none was given; force makes nothing
/// of names and of containers at rest, and takes a name off what runs.
fn require_removable(
    image: &Image,
    named: Option<&str>,
    users: &[&Container],
    force: bool,
) -> Result<Goes, EngineError> {
    let id = short(&image.id);
    let refuse = |why: String| Err(EngineError::Conflict(format!("conflict: unable to {why}")));
    if let (Some(name), Some(user), false) = (named, users.first(), force) {
        let user = short(&user.id);
        return refuse(format!(
            "remove repository reference {name:?} (must force) - container {user} is using its referenced image {id}: \
             remove that first"
        ));
    }
    let running = users.iter().find(|container| container.require_running().is_ok());
    if running.is_some() && named.is_some() {
        return Ok(Goes::NameAlone);
    }
    if let Some(user) = running {
        let user = short(&user.id);
        return refuse(format!("delete {id} (cannot be forced) - image is being used by running container {user}"));
    }
    if !force && named.is_none() && image.tags.len() > 1 {
        return refuse(format!("delete {id} (must be forced) - image is referenced in multiple repositories"));
    }
    match users.first() {
        Some(user) if !force => {
            let user = short(&user.id);
            refuse(format!("delete {id} (must be forced) - image is being used by stopped container {user}"))
        }
        _ => Ok(Goes::All),
    }
}

impl Engine {
    /// Which registries are asked from now on, and how.
    pub fn set_registries(&self, registries: RegistryConfig) {
        self.puller.set_config(registries);
    }

    #[must_use]
    pub fn images(&self) -> Vec<Image> {
        self.images.list()
    }

    pub fn image(&self, name: &str) -> Result<Image, EngineError> {
        let full = || match crate::image::pinned(name) {
            Some(pinned) => Some(pinned),
            None => normalize(name),
        };
        if is_builtin(name) {
            let _one = self.carrying.lock().expect("nobody panics while holding it");
            builtin::ensure(&self.images).map_err(disk_error("storing the built-in image"))?;
        }
        self.images.find(name).ok_or_else(|| {
            EngineError::NoImage(full().map_or_else(|| name.to_owned(), |full| familiar(&full).to_owned()))
        })
    }

    pub(crate) fn tell_image(&self, action: &str, id: &str, name: &str) {
        let image = self.images.find(id).or_else(|| self.images.find(name));
        let mut attributes = image.map(|image| image.config.labels).unwrap_or_default();
        attributes.insert("name".to_owned(), familiar(name).to_owned());
        self.tell("image", action, id, attributes);
    }

    /// The image, if it is for a platform that is asked for.
    pub fn image_for(&self, name: &str, platform: Option<&Platform>) -> Result<Image, EngineError> {
        let image = self.image(name)?;
        match platform {
            Some(wanted) if !wanted.takes(&image.platform()) => Err(EngineError::OtherPlatform {
                image: name.to_owned(),
                wanted: wanted.to_string(),
                actual: image.platform().to_string(),
            }),
            _ => Ok(image),
        }
    }

    /// Pulls an image, for this host's platform if none is named; progress goes to `progress` as far as somebody takes it.
    pub async fn pull(
        &self,
        name: &str,
        platform: Option<&Platform>,
        credentials: &Credentials,
        progress: &mpsc::Sender<PullProgress>,
    ) -> Result<Image, EngineError> {
        if is_builtin(name) {
            return self.image_for(name, platform);
        }
        let _under_way = self.layers_under_way.read().await;
        let image = self.puller.pull(name, platform, credentials, progress).await?;
        self.tell_image("pull", familiar(name), name);
        Ok(image)
    }

    /// All names in its registry that `name` stands for: itself if it has a tag or a digest, else all of its repository's.
    pub async fn names_in_registry(&self, name: &str, credentials: &Credentials) -> Result<Vec<String>, EngineError> {
        let last = name.rsplit('/').next().unwrap_or(name);
        if last.contains([':', '@']) || is_builtin(name) {
            return Ok(vec![name.to_owned()]);
        }
        let tags = self.puller.tags(name, credentials).await?;
        Ok(tags.into_iter().map(|tag| format!("{name}:{tag}")).collect())
    }

    /// Asks the registry what a name stands for.
    pub async fn resolve(&self, name: &str, credentials: &Credentials) -> Result<Resolved, EngineError> {
        Ok(self.puller.resolve(name, credentials).await?)
    }

    /// Sends an image to the registry that its name says.
    pub async fn push(
        &self,
        name: &str,
        credentials: &Credentials,
        progress: &mpsc::Sender<PullProgress>,
    ) -> Result<Pushed, EngineError> {
        let image = self.image(name)?;
        let pushed = self.puller.push(&self.images, &image, name, credentials, progress).await?;
        self.tell_image("push", familiar(name), name);
        Ok(pushed)
    }

    /// All names of images here that `name` stands for: itself if it has a tag or a digest, else all of its repository's.
    #[must_use]
    pub fn names_in(&self, name: &str) -> Vec<String> {
        let last = name.rsplit('/').next().unwrap_or(name);
        if last.contains([':', '@']) {
            return vec![name.to_owned()];
        }
        let wanted = repository(name);
        let names = self.images().into_iter().flat_map(|image| image.tags);
        names.filter(|name| repository(name) == wanted).map(|name| familiar(&name).to_owned()).collect()
    }

    /// Asks a registry whether it takes the credentials.
    pub async fn login(&self, registry: &str, credentials: &Credentials) -> Result<(), EngineError> {
        Ok(self.puller.login(registry, credentials).await?)
    }

    /// Gives an image one more name.
    pub fn tag(&self, name: &str, new: &str) -> Result<(), EngineError> {
        let image = self.image(name)?;
        let full = normalize(new).filter(|_| !new.contains('@'));
        let full =
            full.ok_or_else(|| EngineError::Invalid(format!("invalid reference format: {new:?} is no image name")))?;
        if familiar(&full).starts_with("sha256:") {
            return Err(EngineError::Invalid(
                "refusing to create an ambiguous tag using digest algorithm as name: choose another".into(),
            ));
        }
        self.images.tag(&image.id, full).map_err(disk_error(format!("naming image {new}")))?;
        self.tell_image("tag", &image.id, new);
        Ok(())
    }

    /// The containers that stand on an image.
    #[must_use]
    pub fn image_users(&self, id: &str) -> Vec<String> {
        let containers = self.lock();
        let users = containers.values().filter(|container| container.config().uses_image(id));
        users.map(|container| container.id.clone()).collect()
    }

    /// Takes a name off an image, and the image away with its last name. By its id all names go, if
    /// there is one or `force` is given.
    pub fn remove_image(&self, name: &str, force: bool) -> Result<Removal, EngineError> {
        let image = self.image(name)?;
        let by_tag = normalize(name).is_some_and(|tag| image.tags.contains(&tag));
        let containers = self.lock();
        let mut goes = Goes::All;
        if image.tags.len() <= 1 || !by_tag {
            let users = containers.values().filter(|container| container.config().uses_image(&image.id));
            let named = by_tag.then_some(name);
            goes = require_removable(&image, named, &users.map(AsRef::as_ref).collect::<Vec<_>>(), force)?;
        }
        let in_use: BTreeSet<String> = containers.values().flat_map(|container| container.held_layers()).collect();
        let keep = goes == Goes::NameAlone;
        let removal =
            self.images.remove(name, &image, &in_use, keep).map_err(disk_error(format!("removing image {name}")))?;
        drop(containers);
        self.prune_storage()?;
        for tag in &removal.untagged {
            self.tell_image("untag", &image.id, tag);
        }
        if !removal.deleted.is_empty() {
            self.tell_image("delete", &image.id, &image.id);
        }
        Ok(removal)
    }

    /// Removes the images that `wanted` says and no container stands on; returns what went.
    pub fn prune_images(&self, wanted: impl Fn(&Image) -> bool) -> Removal {
        let mut all = Removal::default();
        for image in self.images().into_iter().filter(|image| wanted(image) && self.image_users(&image.id).is_empty()) {
            // One that came into use meanwhile stays.
            if let Ok(removal) = self.remove_image(&image.id, true) {
                all.untagged.extend(removal.untagged);
                all.deleted.extend(removal.deleted);
                all.bytes += removal.bytes;
            }
        }
        all
    }

    /// Removes layers that no image has, unless some are just coming in; returns the bytes that are
    /// free now.
    pub fn prune_layers(&self) -> Result<u64, EngineError> {
        let Ok(_alone) = self.layers_under_way.try_write() else { return Ok(0) };
        let in_use: BTreeSet<String> = self.lock().values().flat_map(|container| container.held_layers()).collect();
        let bytes = self.images.remove_orphans(&in_use).map_err(disk_error("removing layers that nobody needs"))?;
        self.prune_storage()?;
        Ok(bytes)
    }

    /// Removes all that builds have left, what they keep for the next ones too, unless one is under way; returns the
    /// bytes that are free now.
    pub fn prune_builds(&self) -> Result<u64, EngineError> {
        let bytes = self.prune_layers()?;
        let Ok(_alone) = self.layers_under_way.try_write() else { return Ok(bytes) };
        let kept: u64 = self.build_caches().iter().map(|(_, bytes)| bytes).sum();
        match std::fs::remove_dir_all(self.images.cache_mounts()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(disk_error("removing what builds keep for the next ones")(error))
            }
            _ => Ok(bytes + kept),
        }
    }

    /// What steps of builds keep for the next ones: ids and bytes.
    #[must_use]
    pub fn build_caches(&self) -> Vec<(String, u64)> {
        let dirs = std::fs::read_dir(self.images.cache_mounts()).into_iter().flatten().flatten();
        dirs.map(|dir| (dir.file_name().to_string_lossy().into_owned(), crate::disk::usage(&dir.path()))).collect()
    }

    /// Turns at those that are not shared.
    pub(crate) fn caches(&self) -> &Turns {
        &self.build_caches
    }

    fn prune_storage(&self) -> Result<(), EngineError> {
        let is_there = |layer: &str| self.images.has_directory(layer) || self.config.data_dir.join(layer).is_dir();
        self.storage().prune(&is_there).map_err(disk_error("removing what stands on layers that are gone"))
    }

    /// Says that layers come in, as long as the guard lives.
    pub(crate) async fn layers_under_way(&self) -> tokio::sync::RwLockReadGuard<'_, ()> {
        self.layers_under_way.read().await
    }

    /// Bytes that images take on disk, each layer once.
    #[must_use]
    pub fn layers_size(&self) -> u64 {
        let layers: BTreeSet<String> = self.images().into_iter().flat_map(|image| image.layers).collect();
        layers.iter().map(|layer| crate::disk::usage(&self.images.layer_dir(layer))).sum()
    }

    /// How an image was made, the last step first.
    pub fn history(&self, name: &str) -> Result<Vec<HistoryLine>, EngineError> {
        let image = self.image(name)?;
        let blob =
            self.images.config_blob(&image.id).ok().and_then(|raw| serde_json::from_slice::<ConfigBlob>(&raw).ok());
        let mut layers = image.layers.iter();
        let mut lines = Vec::new();
        for entry in blob.map(|blob| blob.history).unwrap_or_default() {
            let layer = if entry.empty_layer { None } else { layers.next() };
            lines.push(HistoryLine {
                id: None,
                created: entry.created.and_then(|text| Timestamp::parse(&text)).unwrap_or_default(),
                created_by: entry.created_by,
                comment: entry.comment,
                size_bytes: layer.map_or(0, |layer| crate::disk::usage(&self.images.layer_dir(layer))),
                tags: Vec::new(),
            });
        }
        lines.reverse();
        if let Some(first) = lines.first_mut() {
            first.id = Some(image.id.clone());
            first.tags = image.tags.iter().map(|tag| familiar(tag).to_owned()).collect();
        }
        Ok(lines)
    }

    /// Whether an image stands on another: on its layers, and after all that was done for it.
    #[must_use]
    pub fn stands_on(&self, image: &Image, below: &Image) -> bool {
        let done = |image: &Image| {
            let raw = self.images.config_blob(&image.id).ok();
            let blob: Option<ConfigBlob> = raw.and_then(|raw| serde_json::from_slice(&raw).ok());
            let history = blob.map(|blob| blob.history).unwrap_or_default().into_iter();
            history.map(|entry| (entry.created, entry.created_by)).collect::<Vec<_>>()
        };
        image.id == below.id || (image.layers.starts_with(&below.layers) && done(image).starts_with(&done(below)))
    }

    /// The image that one was made from, if that is here.
    #[must_use]
    pub fn image_below(&self, image: &Image) -> Option<String> {
        let others =
            self.images.list().into_iter().filter(|other| other.id != image.id && self.stands_on(image, other));
        others.max_by_key(|other| (other.layers.len(), other.created)).map(|other| other.id)
    }

    /// Who made an image, and what they said of it.
    #[must_use]
    pub fn image_notes(&self, image: &Image) -> (String, String) {
        let blob =
            self.images.config_blob(&image.id).ok().and_then(|raw| serde_json::from_slice::<ConfigBlob>(&raw).ok());
        blob.map(|blob| (blob.author, blob.comment)).unwrap_or_default()
    }

    /// What `save` was asked for: each image with the names it is saved under.
    pub fn images_to_save(&self, names: &[String]) -> Result<Vec<(Image, Vec<String>)>, EngineError> {
        let mut found: Vec<(Image, Vec<String>)> = Vec::new();
        let mut add = |image: Image, tag: Option<String>| match found.iter_mut().find(|(other, _)| other.id == image.id)
        {
            Some((_, tags)) => tags.extend(tag),
            None => found.push((image, tag.into_iter().collect())),
        };
        for name in names {
            let of_repository = self.images_of_repository(name);
            if of_repository.is_empty() {
                let image = self.image(name)?;
                let tag = normalize(name).filter(|tag| image.tags.contains(tag));
                add(image, tag);
            }
            of_repository.into_iter().for_each(|(image, tag)| add(image, Some(tag)));
        }
        Ok(found)
    }

    /// All that a repository's name alone stands for, tag by tag; nothing if a tag or digest is named.
    fn images_of_repository(&self, name: &str) -> Vec<(Image, String)> {
        let Some(latest) = normalize(name) else { return Vec::new() };
        let Some(repository) = latest.strip_suffix(":latest").filter(|_| !name.ends_with(":latest")) else {
            return Vec::new();
        };
        let tag_of = |tag: &String| tag.rsplit_once(':').is_some_and(|(own, _)| own == repository);
        let images = self.images.list().into_iter();
        images
            .flat_map(|image| {
                let tags: Vec<_> = image.tags.iter().filter(|tag| tag_of(tag)).cloned().collect();
                tags.into_iter().map(move |tag| (image.clone(), tag))
            })
            .collect()
    }

    /// Writes images as one archive; takes its time.
    pub fn save_images(&self, images: &[(Image, Vec<String>)], to: impl Write) -> io::Result<()> {
        archive::save(&self.images, images, to)?;
        for (image, _) in images {
            self.tell_image("save", &image.id, &image.id);
        }
        Ok(())
    }

    /// Takes the images of an archive in, those for one platform where that is named; takes its time. Returns what to tell of each.
    pub fn load_images(&self, archive: impl Read, platform: Option<&Platform>) -> Result<Vec<String>, EngineError> {
        let _under_way = self.layers_under_way.blocking_read();
        let before = self.images();
        let loaded = archive::load(&self.images, archive, platform).map_err(|error| {
            EngineError::Invalid(format!("the archive cannot be loaded: {}", skep_api::with_causes(&error)))
        })?;
        let mut told = Vec::new();
        for (image, tags) in loaded {
            self.tell_image("load", &image.id, &image.id);
            if tags.is_empty() {
                told.push(format!("Loaded image ID: {}", image.id));
            }
            for tag in &tags {
                let had = |other: &&Image| other.id != image.id && other.tags.iter().any(|name| familiar(name) == *tag);
                if let Some(old) = before.iter().find(had) {
                    let old = &old.id;
                    told.push(format!(
                        "The image {tag} already exists, renaming the old one with ID {old} to empty string"
                    ));
                }
                told.push(format!("Loaded image: {tag}"));
            }
        }
        Ok(told)
    }

    /// Makes an image of a file system's archive; takes its time. `changes` are instructions as a
    /// Dockerfile has them.
    pub fn import_image(
        &self,
        archive: impl Read,
        name: &str,
        message: &str,
        changes: &[String],
        platform: Platform,
    ) -> Result<Image, EngineError> {
        let _under_way = self.layers_under_way.blocking_read();
        let tags = if name.is_empty() {
            BTreeSet::new()
        } else {
            let full = normalize(name);
            BTreeSet::from([full.ok_or_else(|| EngineError::Invalid(format!("invalid reference format: {name:?}")))?])
        };
        let created = now().to_string();
        let mut config = ConfigBlob {
            created: Some(created.clone()),
            config: Some(instruction::apply_changes(Default::default(), changes).map_err(EngineError::Invalid)?),
            ..ConfigBlob::of(platform)
        };
        config.history =
            vec![HistoryEntry { created: Some(created), comment: message.to_owned(), ..Default::default() }];
        config.comment = message.to_owned();
        let image = archive::import(&self.images, archive, config, tags).map_err(|error| {
            EngineError::Invalid(format!("the archive cannot be imported: {}", skep_api::with_causes(&error)))
        })?;
        self.tell_image("import", &image.id, name);
        Ok(image)
    }
}
