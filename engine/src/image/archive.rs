//! Images as one archive: what `save` writes and `load` reads. Written is an OCI image layout with the
//! `manifest.json` and `repositories` that older programs look for; read is either of the first two.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::image::layer::{self, LayerBlob};
use crate::image::platform::{self, Platform};
use crate::image::store::{ConfigBlob, Image, ImageStore};
use crate::image::unpack;
use crate::sys;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// What stands in an archive beside layers is short.
const JSON_LEN_MAX: u64 = 16 << 20;

/// Writes images, each with the names it is saved under.
pub(crate) fn save(store: &ImageStore, images: &[(Image, Vec<String>)], to: impl Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(to);
    let mut written = BTreeSet::new();
    let (mut index, mut legacy) = (Vec::new(), Vec::new());
    let mut repositories: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (image, tags) in images {
        let config = store.config_blob(&image.id).map_err(|_| without_archive(&image.id))?;
        let mut layers = Vec::new();
        for diff_id in &image.layers {
            let (path, blob) = store.blob(diff_id).ok_or_else(|| without_archive(&image.id))?;
            if written.insert(blob.digest.clone()) {
                append(&mut tar, &blob_name(&blob.digest), fs::metadata(&path)?.len(), File::open(&path)?)?;
            }
            layers.push(blob);
        }
        let entries: Vec<_> = layers
            .iter()
            .map(|blob| json!({"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size_bytes}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": image.id, "size": config.len()}, "layers": entries,
        });
        let manifest = serde_json::to_vec(&manifest)?;
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&manifest)));
        let made = u64::try_from(image.created.as_nanos() / 1_000_000_000).unwrap_or(0);
        for (digest, bytes) in [(&image.id, &config), (&digest, &manifest)] {
            if written.insert(digest.clone()) {
                append_at(&mut tar, &blob_name(digest), bytes.len() as u64, bytes.as_slice(), made)?;
            }
        }
        let entry = json!({"mediaType": MANIFEST, "digest": digest, "size": manifest.len()});
        index.extend(if tags.is_empty() { vec![entry.clone()] } else { Vec::new() });
        for tag in tags {
            let mut entry = entry.clone();
            entry["annotations"] = json!({"io.containerd.image.name": tag,
                "org.opencontainers.image.ref.name": tag.rsplit_once(':').map_or("latest", |(_, tag)| tag)});
            index.push(entry);
        }
        let tags: Vec<_> = tags.iter().map(|tag| super::familiar(tag)).collect();
        let last = layers.last().map_or(&image.id, |blob| &blob.digest).trim_start_matches("sha256:");
        for (repository, tag) in tags.iter().filter_map(|name| name.rsplit_once(':')) {
            repositories.entry(repository.to_owned()).or_default().insert(tag.to_owned(), last.to_owned());
        }
        let layers: Vec<_> = layers.iter().map(|blob| blob_name(&blob.digest)).collect();
        legacy.push(json!({"Config": blob_name(&image.id), "RepoTags": tags, "Layers": layers}));
    }
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": index});
    let files = [
        ("oci-layout", json!({"imageLayoutVersion": "1.0.0"})),
        ("index.json", index),
        ("manifest.json", Value::Array(legacy)),
    ];
    // Of still older programs; not there without a name, as with Docker.
    let names = (!repositories.is_empty()).then(|| ("repositories", json!(repositories)));
    for (name, value) in files.into_iter().chain(names) {
        let bytes = serde_json::to_vec(&value)?;
        append(&mut tar, name, bytes.len() as u64, bytes.as_slice())?;
    }
    tar.into_inner()?.flush()
}

fn without_archive(id: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::NotFound,
        format!("image {id} was stored by a version that kept no archives of layers: pull it again"),
    )
}

fn blob_name(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn append(tar: &mut tar::Builder<impl Write>, name: &str, len: u64, data: impl Read) -> io::Result<()> {
    append_at(tar, name, len, data, 0)
}

fn append_at(
    tar: &mut tar::Builder<impl Write>,
    name: &str,
    len: u64,
    data: impl Read,
    seconds: u64,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(len);
    header.set_mode(0o644);
    header.set_mtime(seconds);
    tar.append_data(&mut header, name, data)
}

/// One image of an archive.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct LegacyEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    /// None, as Go writes an empty list.
    layers: Option<Vec<String>>,
}

/// Reads an archive and keeps its images, those for one platform where that is named; returns them with the names they came with.
pub(crate) fn load(
    store: &ImageStore,
    archive: impl Read,
    platform: Option<&Platform>,
) -> io::Result<Vec<(Image, Vec<String>)>> {
    let dir = store.incoming()?;
    let loaded = unpack::decompress(archive).and_then(|plain| {
        let mut tar = tar::Archive::new(plain);
        for entry in tar.entries()? {
            let mut entry = entry?;
            // Links out of the directory are refused by the reader; what is no file or link has no use.
            if !entry.unpack_in(&dir)? {
                return Err(invalid("an entry would land outside the archive"));
            }
        }
        load_from(store, &dir, platform)
    });
    let removed = fs::remove_dir_all(&dir);
    let loaded = loaded?;
    removed.map(|()| loaded)
}

fn load_from(store: &ImageStore, dir: &Path, platform: Option<&Platform>) -> io::Result<Vec<(Image, Vec<String>)>> {
    let entries = match read_json::<Vec<LegacyEntry>>(dir, "manifest.json") {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => layout_entries(dir, platform)?,
        Err(error) => return Err(error),
    };
    let mut loaded = Vec::new();
    for entry in entries {
        let raw = read_file(dir, &entry.config)?;
        let config: ConfigBlob = serde_json::from_slice(&raw)?;
        if platform.is_some_and(|wanted| !wanted.takes(&config.platform())) {
            continue;
        }
        let layers = entry.layers.unwrap_or_default();
        if config.rootfs.diff_ids.len() != layers.len() {
            return Err(invalid("an image has another number of layers than its configuration says"));
        }
        for (path, diff_id) in layers.iter().zip(&config.rootfs.diff_ids) {
            if !store.has_layer(diff_id) {
                load_layer(store, dir, path, diff_id)?;
            }
        }
        let tags: Vec<_> = entry.repo_tags.unwrap_or_default();
        let full = tags.iter().filter_map(|tag| super::normalize(tag)).collect();
        let image = store.keep_config(&raw, full, BTreeSet::new())?;
        loaded.push((image, tags));
    }
    match platform {
        Some(wanted) if loaded.is_empty() => Err(invalid(&format!("no image in it is for {wanted}"))),
        _ => Ok(loaded),
    }
}

fn load_layer(store: &ImageStore, dir: &Path, path: &str, diff_id: &str) -> io::Result<()> {
    let into = store.incoming()?;
    let archive = into.with_extension("archive");
    let kept = (|| {
        io::copy(&mut sys::open_in_root(dir, Path::new(path))?, &mut File::create(&archive)?)?;
        unpack::unpack(File::open(&archive)?, &into, diff_id).map_err(io::Error::other)?;
        let blob = LayerBlob {
            digest: layer::digest_of(&archive)?,
            media_type: layer::media_type(&archive)?.into(),
            size_bytes: fs::metadata(&archive)?.len(),
        };
        store.keep_layer(&into, &archive, &blob, diff_id)
    })();
    if kept.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_dir_all(&into);
        let _ = fs::remove_file(&archive);
    }
    kept
}

/// The images of an OCI layout: of several variants of one, that for the platform which is asked for or else this
/// host's, or if there is none for that the first that is there.
fn layout_entries(dir: &Path, wanted: Option<&Platform>) -> io::Result<Vec<LegacyEntry>> {
    let index: Value = read_json(dir, "index.json")?;
    let mut by_manifest: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in index["manifests"].as_array().into_iter().flatten() {
        let Some(digest) = entry["digest"].as_str() else { continue };
        let name = entry["annotations"]["io.containerd.image.name"]
            .as_str()
            .or_else(|| entry["annotations"]["org.opencontainers.image.ref.name"].as_str());
        by_manifest.entry(digest.to_owned()).or_default().extend(name.map(str::to_owned));
    }
    let mut entries = Vec::new();
    for (digest, names) in by_manifest {
        let mut manifest: Value = read_json(dir, &blob_name(&digest))?;
        if let Some(variants) = manifest["manifests"].as_array() {
            // Saved archives may name variants that they do not hold, and attestations.
            let is_there = |variant: &&Value| {
                let name = variant["digest"].as_str().map(blob_name);
                variant["platform"]["os"] != "unknown" && name.is_some_and(|name| dir.join(name).exists())
            };
            let there: Vec<&Value> = variants.iter().filter(is_there).collect();
            let platform = |variant: &&Value| serde_json::from_value(variant["platform"].clone()).ok();
            let own = Platform::own();
            let chosen = platform::best(wanted.unwrap_or(&own), &there, platform);
            let chosen = chosen.or_else(|| there.first().filter(|_| wanted.is_none()));
            let Some(digest) = chosen.and_then(|variant| variant["digest"].as_str()) else { continue };
            manifest = read_json(dir, &blob_name(digest))?;
        }
        let name_of = |descriptor: &Value| descriptor["digest"].as_str().map(blob_name);
        let layers = manifest["layers"].as_array().into_iter().flatten().filter_map(name_of).collect();
        let config = name_of(&manifest["config"]).ok_or_else(|| invalid("an image has no configuration"))?;
        entries.push(LegacyEntry { config, repo_tags: Some(names), layers: Some(layers) });
    }
    Ok(entries)
}

fn read_json<T: serde::de::DeserializeOwned>(dir: &Path, path: &str) -> io::Result<T> {
    Ok(serde_json::from_slice(&read_file(dir, path)?)?)
}

fn read_file(dir: &Path, path: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = sys::open_in_root(dir, &PathBuf::from(path))
        .map_err(|error| io::Error::new(error.kind(), format!("{path} is not in the archive: {error}")))?;
    file.take(JSON_LEN_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Makes an image of one layer out of a file system's archive.
pub(crate) fn import(
    store: &ImageStore,
    archive: impl Read,
    mut config: ConfigBlob,
    tags: BTreeSet<String>,
) -> io::Result<Image> {
    let dir = store.incoming()?;
    let made = (|| {
        unpack::unpack_unchecked(archive, &dir).map_err(io::Error::other)?;
        layer::seal(store, &dir)
    })();
    if made.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_dir_all(&dir);
    }
    config.rootfs.kind = "layers".into();
    config.rootfs.diff_ids = vec![made?.0];
    store.keep_config(&serde_json::to_vec(&config)?, tags, BTreeSet::new())
}
