//! The images of this host: records as JSON files, layers unpacked once each and shared.
//!
//! A layer's directory is named by the digest of its plain data, so it is the same whatever image
//! it belongs to, and two images share it. Its archive is kept beside it, as it came: what is pushed
//! or saved is what was pulled, bit for bit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use skep_api::Timestamp;

use crate::container::rootfs::ContainerDirs;
use crate::container::storage::Overlay2;
use crate::disk;
use crate::image::layer::LayerBlob;
use crate::image::platform::Platform;

/// An image as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// `sha256:…` of the configuration.
    pub id: String,
    /// The names it goes by, such as `registry:5000/app:1`.
    pub tags: BTreeSet<String>,
    /// The names that pin it, such as `registry:5000/app@sha256:…`.
    pub digests: BTreeSet<String>,
    pub config: ImageConfig,
    /// Layers' plain digests, lowest first.
    pub layers: Vec<String>,
    pub size_bytes: u64,
    pub architecture: String,
    pub os: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
    pub created: Timestamp,
}

impl Image {
    /// What it is made for.
    #[must_use]
    pub fn platform(&self) -> Platform {
        let (os, architecture) = (self.os.clone(), self.architecture.clone());
        Platform { os, architecture, variant: self.variant.clone() }
    }
}

/// What an image says of its containers: the OCI image-spec's `config`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    pub user: String,
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    pub working_dir: String,
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_default")]
    pub volumes: BTreeMap<String, serde_json::Value>,
    #[serde(deserialize_with = "or_default")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<skep_api::container::HealthConfig>,
    /// Instructions for a build on top of it.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub on_build: Vec<String>,
    /// What runs commands that are given as one string.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub shell: Vec<String>,
}

fn or_default<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(d).map(Option::unwrap_or_default)
}

/// The configuration blob of an image.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ConfigBlob {
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) variant: String,
    #[serde(default)]
    pub(crate) created: Option<String>,
    #[serde(default)]
    pub(crate) config: Option<ImageConfig>,
    pub(crate) rootfs: RootFs,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) history: Vec<HistoryEntry>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) author: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) comment: String,
}

impl ConfigBlob {
    /// One that has nothing yet.
    pub(crate) fn of(platform: Platform) -> Self {
        let Platform { os, architecture, variant } = platform;
        Self { os, architecture, variant, ..Self::default() }
    }

    pub(crate) fn platform(&self) -> Platform {
        let (os, architecture) = (self.os.clone(), self.architecture.clone());
        Platform { os, architecture, variant: self.variant.clone() }
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct RootFs {
    #[serde(rename = "type", default)]
    pub(crate) kind: String,
    /// Go writes an empty list as null.
    #[serde(default, deserialize_with = "or_empty")]
    pub(crate) diff_ids: Vec<String>,
}

fn or_empty<'de, D: serde::Deserializer<'de>>(reader: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(reader)?.unwrap_or_default())
}

/// One step of an image's making: the OCI image-spec's `history`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct HistoryEntry {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) created: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) created_by: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) author: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) comment: String,
    /// Whether it changed no file.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) empty_layer: bool,
}

/// The images and layers below one directory.
#[derive(Debug)]
pub(crate) struct ImageStore {
    dir: PathBuf,
    images: Mutex<BTreeMap<String, Image>>,
}

impl ImageStore {
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let store = Self { dir: dir.to_owned(), images: Mutex::default() };
        for sub in ["records", "layers", "blobs", "configs"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        // What an interrupted pull or build left is of no use. A file system that a build had mounted is
        // taken down first, so that nothing is removed through it.
        for entry in fs::read_dir(dir.join("incoming")).into_iter().flatten().flatten() {
            let left = ContainerDirs {
                run: entry.path().join("run"),
                data: entry.path(),
                shift: None,
                storage: Arc::new(Overlay2),
            };
            left.unmount()?;
        }
        let _ = fs::remove_dir_all(dir.join("incoming"));
        fs::create_dir_all(dir.join("incoming"))?;
        for entry in fs::read_dir(dir.join("records"))? {
            let path = entry?.path();
            match fs::read(&path)
                .map_err(io::Error::other)
                .and_then(|bytes| Ok(serde_json::from_slice::<Image>(&bytes)?))
            {
                Ok(image) => drop(store.lock().insert(image.id.clone(), image)),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "an image's record is damaged; pull it again")
                }
            }
        }
        Ok(store)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Image>> {
        self.images.lock().expect("nobody panics while holding it")
    }

    pub(crate) fn list(&self) -> Vec<Image> {
        self.lock().values().cloned().collect()
    }

    /// Finds an image by tag, digest, id, or the beginning of its id.
    pub(crate) fn find(&self, name: &str) -> Option<Image> {
        let images = self.lock();
        let (bare, pin) = name.split_once('@').map_or((name, None), |(bare, pin)| (bare, Some(pin)));
        if let Some(pin) = pin {
            let repository = super::repository(bare);
            let full = format!("{repository}@{pin}");
            return images.values().find(|image| image.digests.contains(&full)).cloned();
        }
        let tagged = super::normalize(name);
        let by_tag = images.values().find(|image| tagged.as_ref().is_some_and(|tag| image.tags.contains(tag)));
        by_tag.cloned().or_else(|| {
            let id = name.strip_prefix("sha256:").unwrap_or(name);
            let hex = id.len() >= 4 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
            let mut matching = images.values().filter(|image| hex && image.id["sha256:".len()..].starts_with(id));
            matching.next().filter(|_| matching.next().is_none()).cloned()
        })
    }

    pub(crate) fn layer_dir(&self, diff_id: &str) -> PathBuf {
        self.dir.join("layers").join(layer_name(diff_id))
    }

    /// Whether a layer's directory of this name is here.
    pub(crate) fn has_directory(&self, name: &str) -> bool {
        self.dir.join("layers").join(name).is_dir()
    }

    /// Whether the layer is here, unpacked and as an archive.
    pub(crate) fn has_layer(&self, diff_id: &str) -> bool {
        self.layer_dir(diff_id).exists() && self.blob(diff_id).is_some()
    }

    fn blob_path(&self, diff_id: &str) -> PathBuf {
        self.dir.join("blobs").join(layer_name(diff_id))
    }

    /// A layer's archive, and what registries call it.
    pub(crate) fn blob(&self, diff_id: &str) -> Option<(PathBuf, LayerBlob)> {
        let path = self.blob_path(diff_id);
        let blob = serde_json::from_slice(&fs::read(path.with_extension("json")).ok()?).ok()?;
        path.exists().then_some((path, blob))
    }

    /// Keeps another archive of a layer, such as a compressed one.
    pub(crate) fn keep_blob(&self, archive: &Path, blob: &LayerBlob, diff_id: &str) -> io::Result<()> {
        let path = self.blob_path(diff_id);
        fs::rename(archive, &path)?;
        disk::write_whole(&path.with_extension("json"), &serde_json::to_vec(blob)?)
    }

    /// What steps of builds keep from one build to the next.
    pub(crate) fn cache_mounts(&self) -> PathBuf {
        self.dir.join("cache-mounts")
    }

    /// The configuration blob of an image, byte for byte.
    pub(crate) fn config_blob(&self, id: &str) -> io::Result<Vec<u8>> {
        fs::read(self.dir.join("configs").join(&id["sha256:".len()..]))
    }

    /// Keeps an image whose layers are here by its configuration blob; returns it.
    pub(crate) fn keep_config(
        &self,
        raw: &[u8],
        tags: BTreeSet<String>,
        digests: BTreeSet<String>,
    ) -> io::Result<Image> {
        let config: ConfigBlob = serde_json::from_slice(raw)?;
        let id = format!("sha256:{}", hex::encode(Sha256::digest(raw)));
        disk::write_whole(&self.dir.join("configs").join(&id["sha256:".len()..]), raw)?;
        let size_bytes = config.rootfs.diff_ids.iter().map(|layer| disk::usage(&self.layer_dir(layer))).sum();
        let image = Image {
            id,
            tags,
            digests,
            size_bytes,
            layers: config.rootfs.diff_ids,
            architecture: config.architecture,
            os: config.os,
            variant: config.variant,
            created: config.created.and_then(|text| Timestamp::parse(&text)).unwrap_or_default(),
            config: config.config.unwrap_or_default(),
        };
        self.keep(image.clone())?;
        Ok(image)
    }

    /// A new directory that becomes a layer by [`keep_layer`](Self::keep_layer).
    pub(crate) fn incoming(&self) -> io::Result<PathBuf> {
        let dir = self.dir.join("incoming").join(format!("{:016x}", rand::random::<u64>()));
        fs::create_dir(&dir)?;
        Ok(dir)
    }

    /// Puts an unpacked layer and its archive in their places. Two that bring the same one may race.
    pub(crate) fn keep_layer(&self, from: &Path, archive: &Path, blob: &LayerBlob, diff_id: &str) -> io::Result<()> {
        self.keep_blob(archive, blob, diff_id)?;
        match fs::rename(from, self.layer_dir(diff_id)) {
            Err(_) if self.layer_dir(diff_id).exists() => fs::remove_dir_all(from),
            other => other,
        }
    }

    /// Keeps an image under a tag, a digest, or both; the tag leaves the image that had it.
    pub(crate) fn keep(&self, mut image: Image) -> io::Result<()> {
        let mut images = self.lock();
        for other in images.values_mut().filter(|other| other.id != image.id) {
            if !other.tags.is_disjoint(&image.tags) {
                other.tags = &other.tags - &image.tags;
                self.write(other)?;
            }
        }
        if let Some(before) = images.get(&image.id) {
            image.tags.extend(before.tags.iter().cloned());
            image.digests.extend(before.digests.iter().cloned());
        }
        self.write(&image)?;
        images.insert(image.id.clone(), image);
        Ok(())
    }

    /// Gives an image one more name; the image that had it loses it.
    pub(crate) fn tag(&self, id: &str, tag: String) -> io::Result<()> {
        let image = self.lock().get(id).cloned();
        let mut image = image.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the image is gone"))?;
        image.tags.insert(tag);
        self.keep(image)
    }

    fn write(&self, image: &Image) -> io::Result<()> {
        disk::write_whole(&self.record(&image.id), &serde_json::to_vec_pretty(image)?)
    }

    fn record(&self, id: &str) -> PathBuf {
        self.dir.join("records").join(format!("{}.json", &id["sha256:".len()..]))
    }

    /// Takes one name off an image, or all of them; the image itself goes with its last name, unless
    /// `keep` says that somebody needs it. `in_use` are layers that containers stand on.
    pub(crate) fn remove(
        &self,
        name: &str,
        image: &Image,
        in_use: &BTreeSet<String>,
        keep: bool,
    ) -> io::Result<Removal> {
        let mut images = self.lock();
        let Some(kept) = images.get_mut(&image.id) else { return Ok(Removal::default()) };
        let mut removal = Removal::default();
        let tag = super::normalize(name).filter(|tag| kept.tags.remove(tag));
        let repository = tag.as_deref().map(super::repository).unwrap_or_default();
        removal.untagged.extend(tag);
        if !kept.tags.iter().any(|other| super::repository(other) == repository) {
            // Digests are names in a repository too, and go with the last of its tags.
            let is_there = |digest: &str| digest.split('@').next() == Some(repository.as_str());
            removal.untagged.extend(kept.digests.extract_if(.., |digest| is_there(digest)));
        }
        if removal.untagged.is_empty() && name.contains('@') {
            let digest = super::pinned(name).filter(|digest| kept.digests.remove(digest));
            removal.untagged.extend(digest);
        }
        if removal.untagged.is_empty() {
            removal.untagged.extend(std::mem::take(&mut kept.tags));
        }
        if kept.tags.is_empty() && !keep {
            removal.untagged.extend(std::mem::take(&mut kept.digests));
        } else {
            self.write(kept)?;
            return Ok(removal);
        }
        fs::remove_file(self.record(&image.id))?;
        // Images of an older version had none.
        let _ = fs::remove_file(self.dir.join("configs").join(&image.id["sha256:".len()..]));
        images.remove(&image.id);
        removal.deleted.push(image.id.clone());
        let used: BTreeSet<&String> = images.values().flat_map(|image| &image.layers).chain(in_use).collect();
        for layer in image.layers.iter().filter(|layer| !used.contains(layer)) {
            removal.bytes += disk::usage(&self.layer_dir(layer));
            if self.layer_dir(layer).exists() {
                fs::remove_dir_all(self.layer_dir(layer))?;
                removal.deleted.push(layer.clone());
            }
            let blob = self.blob_path(layer);
            for path in [blob.with_extension("json"), blob] {
                match fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(removal)
    }

    /// Removes layers that no image has and no container stands on: what builds left that failed.
    /// Only while nothing is built or pulled.
    pub(crate) fn remove_orphans(&self, in_use: &BTreeSet<String>) -> io::Result<u64> {
        let images = self.lock();
        let used = images.values().flat_map(|image| &image.layers).chain(in_use);
        let used: BTreeSet<&str> = used.map(|layer| layer_name(layer)).collect();
        let mut bytes = 0;
        for sub in ["layers", "blobs"] {
            for entry in fs::read_dir(self.dir.join(sub))? {
                let path = entry?.path();
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                if used.contains(name.as_str()) {
                    continue;
                }
                if path.is_dir() {
                    bytes += disk::usage(&path);
                    fs::remove_dir_all(&path)?;
                } else {
                    fs::remove_file(&path)?;
                }
            }
        }
        Ok(bytes)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

/// What removing a name came to.
#[derive(Debug, Default)]
pub struct Removal {
    pub untagged: Vec<String>,
    /// The image and the layers that went with it.
    pub deleted: Vec<String>,
    pub bytes: u64,
}

/// 128 bits of the digest: names are short, for overlayfs takes them all in one page.
fn layer_name(diff_id: &str) -> &str {
    let hex = diff_id.strip_prefix("sha256:").unwrap_or(diff_id);
    &hex[..hex.len().min(32)]
}
