//! Images to registries: layers that are not there yet, mounted from a neighbour or sent in pieces,
//! then the configuration and the manifest.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use oci_client::{Client, Reference, RegistryOperation};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_util::io::ReaderStream;

use crate::image::layer::{self, Hashed, LayerBlob};
use crate::image::pull::{Credentials, PullError, PullProgress, Puller, Wire};
use crate::image::reasons::told;
use crate::image::store::{Image, ImageStore};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Layers grow and shrink by little between these levels; the time does not.
const LEVEL: Compression = Compression::new(3);

/// What was pushed.
#[derive(Clone, Debug)]
pub struct Pushed {
    pub tag: String,
    /// The manifest's.
    pub digest: String,
    pub size_bytes: u64,
}

impl Puller {
    /// Sends `image` to the registry that `name` says.
    pub(crate) async fn push(
        &self,
        store: &ImageStore,
        image: &Image,
        name: &str,
        credentials: &Credentials,
        progress: &mpsc::Sender<PullProgress>,
    ) -> Result<Pushed, PullError> {
        let reference: Reference = name.parse().map_err(|_| PullError::Name(name.to_owned()))?;
        let failed = |error: oci_client::errors::OciDistributionError| PullError::Push {
            image: name.to_owned(),
            reason: told(&error),
        };
        let disk = |cause| PullError::Disk { image: name.to_owned(), cause };
        let client = self.client(&reference, self.wire(&reference).await);
        client.auth(&reference, &credentials.to_auth(), RegistryOperation::Push).await.map_err(failed)?;
        let config = store.config_blob(&image.id).map_err(|_| PullError::Damaged {
            image: name.to_owned(),
            reason: "it was stored by a version that kept no archives: pull it again".into(),
        })?;
        let known = store.list();
        let push = |diff_id| {
            push_layer(store, &client, &reference, neighbours(&known, diff_id, &reference), diff_id, progress)
        };
        let pushes: Vec<BoxFuture<'_, _>> = image.layers.iter().map(|diff_id| push(diff_id).boxed()).collect();
        let blobs: Vec<LayerBlob> = futures::stream::iter(pushes)
            .buffered(self.uploads_at_once())
            .try_collect()
            .await
            .map_err(|reason| PullError::Push { image: name.to_owned(), reason })?;
        let config_len = config.len();
        if !client.blob_exists(&reference, &image.id).await.map_err(failed)? {
            client.push_blob(&reference, config, &image.id).await.map_err(failed)?;
        }
        let layers: Vec<_> = blobs
            .iter()
            .map(|blob| json!({"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size_bytes}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": image.id, "size": config_len}, "layers": layers,
        });
        let bytes = serde_json::to_vec(&manifest).map_err(|error| disk(error.into()))?;
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
        let size_bytes = bytes.len() as u64;
        let kind = MANIFEST.parse().map_err(|_| disk(io::Error::other("the media type is no header")))?;
        client.push_manifest_raw(&reference, bytes, kind).await.map_err(failed)?;
        let mut known = image.clone();
        known.digests.insert(format!("{}@{digest}", super::repository(name)));
        store.keep(known).map_err(disk)?;
        Ok(Pushed { tag: reference.tag().unwrap_or("latest").to_owned(), digest, size_bytes })
    }

    /// Asks a registry whether it takes the credentials.
    pub(crate) async fn login(&self, registry: &str, credentials: &Credentials) -> Result<(), PullError> {
        let bare = registry.trim_start_matches("https://").trim_start_matches("http://");
        let host = bare.split('/').next().unwrap_or(bare);
        let host = if matches!(host, "" | "docker.io") { "index.docker.io" } else { host };
        // No repository is meant: a registry that is asked for its version answers without one.
        let reference = Reference::with_tag(host.to_owned(), "none".to_owned(), "latest".to_owned());
        let wire = self.wire(&reference).await;
        let scheme = if wire == Wire::Plain { "http" } else { "https" };
        let url = format!("{scheme}://{host}/v2/");
        let asked = match self.http_client(wire) {
            Ok(client) => ask_version(&client, &url, credentials).await,
            Err(error) => Err(told(&error)),
        };
        asked.map_err(|reason| PullError::Login { url, reason })
    }
}

/// Goes through what a registry asks of a client before it answers.
async fn ask_version(client: &reqwest::Client, url: &str, credentials: &Credentials) -> Result<(), String> {
    let failed = |error: reqwest::Error| told(&error);
    let first = client.get(url).send().await.map_err(failed)?;
    if first.status().is_success() {
        return Ok(());
    }
    let challenge = first.headers().get("www-authenticate").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (kind, params) = challenge.split_once(' ').unwrap_or((challenge, ""));
    let param = |name: &str| {
        params
            .split(',')
            .find_map(|part| Some(part.trim().strip_prefix(name)?.strip_prefix('=')?.trim_matches('"').to_owned()))
    };
    let request = match (kind.to_ascii_lowercase().as_str(), param("realm")) {
        ("basic", _) => client.get(url),
        ("bearer", Some(realm)) => client.get(realm).query(&[("service", param("service").unwrap_or_default())]),
        _ => return Err(format!("it answers {} and says not how to log in", first.status())),
    };
    let request = match credentials {
        Credentials::Anonymous => request,
        Credentials::Basic { username, password } => {
            request.basic_auth(username, Some(String::from_utf8_lossy(password.expose())))
        }
        Credentials::Token(token) => request.bearer_auth(String::from_utf8_lossy(token.expose())),
    };
    let status = request.send().await.map_err(failed)?.status();
    if status.is_success() { Ok(()) } else { Err(format!("unauthorized: incorrect username or password ({status})")) }
}

/// Other repositories of the same registry that have a layer.
fn neighbours(images: &[Image], diff_id: &String, to: &Reference) -> Vec<Reference> {
    let with_it = images.iter().filter(|image| image.layers.contains(diff_id));
    let parsed = with_it.flat_map(|image| &image.digests).filter_map(|digest| digest.parse::<Reference>().ok());
    parsed.filter(|other| other.registry() == to.registry() && other.repository() != to.repository()).collect()
}

async fn push_layer(
    store: &ImageStore,
    client: &Client,
    reference: &Reference,
    neighbours: Vec<Reference>,
    diff_id: &str,
    progress: &mpsc::Sender<PullProgress>,
) -> Result<LayerBlob, String> {
    let id: String = diff_id.chars().skip("sha256:".len()).take(12).collect();
    // Whoever watched may have gone; the push goes on.
    let tell = |status: String| drop(progress.try_send(PullProgress { id: id.clone(), status, bytes: None }));
    tell("Preparing".into());
    let (path, blob) = compressed(store, diff_id).await.map_err(|error| error.to_string())?;
    if client.blob_exists(reference, &blob.digest).await.map_err(|error| told(&error))? {
        tell("Layer already exists".into());
        return Ok(blob);
    }
    for neighbour in neighbours {
        if client.mount_blob(reference, &neighbour, &blob.digest).await.is_ok() {
            tell(format!("Mounted from {}", neighbour.repository()));
            return Ok(blob);
        }
    }
    tell("Pushing".into());
    let file = tokio::fs::File::open(&path).await.map_err(|error| error.to_string())?;
    let pieces = ReaderStream::with_capacity(file, 1 << 20).map_err(Into::into);
    client
        .push_blob_stream(reference, pieces, &blob.digest, Some(blob.size_bytes))
        .await
        .map_err(|error| told(&error))?;
    tell("Pushed".into());
    Ok(blob)
}

/// A layer's archive, compressed by now if it was not.
async fn compressed(store: &ImageStore, diff_id: &str) -> io::Result<(PathBuf, LayerBlob)> {
    let missing = || {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("the archive of layer {diff_id} is not here: pull the image again"),
        )
    };
    let (path, blob) = store.blob(diff_id).ok_or_else(missing)?;
    if blob.media_type != layer::TAR {
        return Ok((path, blob));
    }
    let dir = store.incoming()?;
    let archive = dir.with_extension("archive");
    let (from, into) = (path.clone(), archive.clone());
    let blob = tokio::task::spawn_blocking(move || compress(&from, &into)).await.map_err(io::Error::other)??;
    std::fs::remove_dir(dir)?;
    store.keep_blob(&archive, &blob, diff_id)?;
    Ok((path, blob))
}

fn compress(from: &Path, into: &Path) -> io::Result<LayerBlob> {
    let hashed = Hashed { inner: File::create(into)?, hash: Sha256::new(), len: 0 };
    let mut encoder = GzEncoder::new(hashed, LEVEL);
    io::copy(&mut File::open(from)?, &mut encoder)?;
    let hashed = encoder.finish()?;
    Ok(LayerBlob {
        digest: format!("sha256:{}", hex::encode(hashed.hash.finalize())),
        media_type: layer::TAR_GZIP.into(),
        size_bytes: hashed.len,
    })
}
