//! The images of this host: records as JSON files, layers unpacked once each and shared.
//!
//! A layer's directory is named by the digest of its plain data, so it is the same whatever image
//! it belongs to, and two images share it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use skep_api::Timestamp;

use crate::disk;

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
    pub created: Timestamp,
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
    pub stop_signal: String,
    pub healthcheck: Option<skep_api::container::HealthConfig>,
}

fn or_default<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(d).map(Option::unwrap_or_default)
}

/// The configuration blob of an image, as far as it is used.
#[derive(Debug, Deserialize)]
pub(crate) struct ConfigBlob {
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) created: Option<String>,
    #[serde(default)]
    pub(crate) config: Option<ImageConfig>,
    pub(crate) rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    pub(crate) diff_ids: Vec<String>,
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
        for sub in ["records", "layers"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        // What an interrupted pull left is of no use.
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

    pub(crate) fn has_layer(&self, diff_id: &str) -> bool {
        self.layer_dir(diff_id).exists()
    }

    /// A new directory that becomes a layer by [`keep_layer`](Self::keep_layer).
    pub(crate) fn incoming(&self) -> io::Result<PathBuf> {
        let dir = self.dir.join("incoming").join(format!("{:016x}", rand::random::<u64>()));
        fs::create_dir(&dir)?;
        Ok(dir)
    }

    /// Puts an unpacked layer in its place. Two that bring the same one may race.
    pub(crate) fn keep_layer(&self, from: &Path, diff_id: &str) -> io::Result<()> {
        match fs::rename(from, self.layer_dir(diff_id)) {
            Err(_) if self.has_layer(diff_id) => fs::remove_dir_all(from),
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

    fn write(&self, image: &Image) -> io::Result<()> {
        disk::write_whole(&self.record(&image.id), &serde_json::to_vec_pretty(image)?)
    }

    fn record(&self, id: &str) -> PathBuf {
        self.dir.join("records").join(format!("{}.json", &id["sha256:".len()..]))
    }

    /// Takes one name off an image; the image itself goes with its last name. `in_use` are layers
    /// that containers stand on.
    pub(crate) fn remove(&self, name: &str, image: &Image, in_use: &BTreeSet<String>) -> io::Result<Removal> {
        let mut images = self.lock();
        let Some(kept) = images.get_mut(&image.id) else { return Ok(Removal::default()) };
        let mut removal = Removal::default();
        let tag = super::normalize(name).filter(|tag| kept.tags.remove(tag));
        removal.untagged.extend(tag);
        if removal.untagged.is_empty() {
            removal.untagged.extend(std::mem::take(&mut kept.tags));
        }
        if !kept.tags.is_empty() {
            self.write(kept)?;
            return Ok(removal);
        }
        fs::remove_file(self.record(&image.id))?;
        images.remove(&image.id);
        removal.deleted = Some(image.id.clone());
        let used: BTreeSet<&String> = images.values().flat_map(|image| &image.layers).chain(in_use).collect();
        for layer in image.layers.iter().filter(|layer| !used.contains(layer)) {
            if self.has_layer(layer) {
                fs::remove_dir_all(self.layer_dir(layer))?;
            }
        }
        Ok(removal)
    }
}

/// What removing a name came to.
#[derive(Debug, Default)]
pub struct Removal {
    pub untagged: Vec<String>,
    pub deleted: Option<String>,
}

/// 128 bits of the digest: names are short, for overlayfs takes them all in one page.
fn layer_name(diff_id: &str) -> &str {
    let hex = diff_id.strip_prefix("sha256:").unwrap_or(diff_id);
    &hex[..hex.len().min(32)]
}
