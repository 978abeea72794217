//! Images from registries: OCI and Docker manifests, multi-arch indexes, mirrors, insecure ones by
//! permission; digests are verified, layers fetched and unpacked in parallel.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{DecodeError, Engine as _};
use futures::TryStreamExt as _;
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::manifest::{ImageIndexEntry, OciDescriptor, OciManifest};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use serde::Deserialize;
use skep_api::{IpSubnet, SecretBytes};
use tokio::sync::mpsc;

use crate::image::download::{Download, DownloadError};
use crate::image::layer::LayerBlob;
use crate::image::platform::{self, Platform};
use crate::image::reasons::{no_manifest, registry_error};
use crate::image::store::{ConfigBlob, Image, ImageStore};
use crate::image::unpack::{self, UnpackError};
use crate::turns::Turns;

/// Which registries are asked, and how.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// Asked before Docker Hub, in this order; `http://` or `https://` URLs.
    pub mirrors: Vec<String>,
    /// Registries (`host:port`) that may be spoken to without TLS.
    pub insecure: BTreeSet<String>,
    /// The same for all whose name is an address in these.
    pub insecure_subnets: Vec<IpSubnet>,
    pub proxies: Proxies,
    /// How many layers of an image come, or go, at the same time.
    pub downloads_at_once: usize,
    pub uploads_at_once: usize,
}

impl RegistryConfig {
    fn is_insecure(&self, registry: &str) -> bool {
        let address = || registry.parse().or_else(|_| registry.parse().map(|socket: SocketAddr| socket.ip())).ok();
        let listed = || address().is_some_and(|ip| self.insecure_subnets.iter().any(|subnet| subnet.contains(ip)));
        self.insecure.contains(registry) || is_loopback(registry) || listed()
    }
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            mirrors: Vec::new(),
            insecure: BTreeSet::new(),
            insecure_subnets: Vec::new(),
            proxies: Proxies::default(),
            downloads_at_once: 3,
            uploads_at_once: 5,
        }
    }
}

/// How a registry is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    Tls,
    /// With whatever certificate it shows.
    UnverifiedTls,
    Plain,
}

/// What stands between this host and registries: URLs, and whom it does not stand before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies {
    pub http: Option<String>,
    pub https: Option<String>,
    pub none_for: Option<String>,
}

/// What a user logs in with.
#[derive(Clone, Debug, Default)]
pub enum Credentials {
    #[default]
    Anonymous,
    Basic {
        username: String,
        password: SecretBytes,
    },
    /// An identity token, sent as it is.
    Token(SecretBytes),
}

/// Why credentials cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("X-Registry-Auth cannot be read: it is JSON with username and password, in base 64 for URLs")]
pub struct CredentialsError;

/// Some clients leave the padding out.
const ANY_PADDING: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Reads what a header holds in base 64 for URLs.
pub fn decode_header(header: &[u8]) -> Result<Vec<u8>, DecodeError> {
    ANY_PADDING.decode(header)
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RegistryAuthHeader {
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

impl Credentials {
    /// Reads the `X-Registry-Auth` header of the Engine API; an empty one is anonymous.
    pub fn from_header(header: &[u8]) -> Result<Self, CredentialsError> {
        if header.is_empty() {
            return Ok(Self::Anonymous);
        }
        let bytes = decode_header(header).map_err(|_| CredentialsError)?;
        let auth: RegistryAuthHeader = serde_json::from_slice(&bytes).map_err(|_| CredentialsError)?;
        if let Some(token) = auth.identitytoken.filter(|token| !token.is_empty()) {
            return Ok(Self::Token(SecretBytes::new(token.into_bytes())));
        }
        let Some(username) = auth.username.filter(|name| !name.is_empty()) else { return Ok(Self::Anonymous) };
        Ok(Self::Basic { username, password: SecretBytes::new(auth.password.unwrap_or_default().into_bytes()) })
    }

    pub(crate) fn to_auth(&self) -> RegistryAuth {
        match self {
            Self::Anonymous => RegistryAuth::Anonymous,
            Self::Token(token) => RegistryAuth::Bearer(String::from_utf8_lossy(token.expose()).into_owned()),
            Self::Basic { username, password } => {
                RegistryAuth::Basic(username.clone(), String::from_utf8_lossy(password.expose()).into_owned())
            }
        }
    }
}

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("{0:?} is no image name: write it as [registry/]name[:tag], in lower case")]
    Name(String),
    #[error("image {image} cannot be pulled: {reason}")]
    Registry { image: String, reason: String },
    /// The registry answers, and has no such image, or not for us.
    #[error("image {image} cannot be pulled: {why}: {reason}")]
    Absent { image: String, why: String, reason: String },
    #[error("image {image} cannot be pushed: {reason}")]
    Push { image: String, reason: String },
    #[error("login attempt to {url} failed: {reason}")]
    Login { url: String, reason: String },
    #[error("image {image} has no variant for {platform}; it has {variants}")]
    Platform { image: String, platform: String, variants: String },
    #[error("image {image} is damaged: {reason}")]
    Damaged { image: String, reason: String },
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    #[error("image {image} cannot be stored")]
    Disk {
        image: String,
        #[source]
        cause: std::io::Error,
    },
}

/// How far a pull has come; told layer by layer.
#[derive(Clone, Debug)]
pub struct PullProgress {
    /// The layer's short name, or empty for the image as a whole.
    pub id: String,
    pub status: String,
    /// How many bytes there are, and how many there will be.
    pub bytes: Option<(u64, u64)>,
}

/// As often as dockerd tells of a download.
const TOLD_EVERY_BYTES: u64 = 512 << 10;
const TAGS_A_PAGE: usize = 1_000;
/// More are not pulled at a time.
const TAGS_MAX: usize = 20_000;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const READ_LIMIT: Duration = Duration::from_secs(60);

/// Whom this host trusts, read once: it is hundreds of files, and each client of a registry needs it.
static ROOTS: LazyLock<Vec<Certificate>> = LazyLock::new(|| {
    let found = rustls_native_certs::load_native_certs();
    found
        .errors
        .iter()
        .for_each(|error| tracing::warn!(%error, "some of this host's root certificates cannot be read"));
    let der = |cert: &[u8]| Certificate { encoding: CertificateEncoding::Der, data: cert.to_vec() };
    found.certs.iter().map(|cert| der(cert)).collect()
});

/// Talks to registries for one engine.
pub(crate) struct Puller {
    config: ArcSwap<RegistryConfig>,
    store: Arc<ImageStore>,
    /// At layers on their way in: whoever wants one of them too waits for it.
    under_way: Turns,
}

/// What a name stands for in its registry.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Of the manifest or index that the name points to.
    pub digest: String,
    pub media_type: String,
    pub size_bytes: u64,
    /// Of each variant.
    pub platforms: Vec<Platform>,
}

impl Puller {
    pub(crate) fn new(config: RegistryConfig, store: Arc<ImageStore>) -> Self {
        Self { config: ArcSwap::from_pointee(config), store, under_way: Turns::default() }
    }

    /// What is fetched from now on goes by this.
    pub(crate) fn set_config(&self, config: RegistryConfig) {
        self.config.store(Arc::new(config));
    }

    /// How a registry is spoken to. One that may be spoken to without TLS is asked whether it has it all the same.
    pub(crate) async fn wire(&self, reference: &Reference) -> Wire {
        if !self.config.load().is_insecure(reference.registry()) {
            return Wire::Tls;
        }
        let Ok(client) = self.http_client(Wire::UnverifiedTls) else { return Wire::Plain };
        let url = format!("https://{}/v2/", reference.resolve_registry());
        match client.get(url).timeout(CONNECT_LIMIT).send().await {
            Ok(_) => Wire::UnverifiedTls,
            Err(_) => Wire::Plain,
        }
    }

    /// Asks registries for what has nothing to do with images.
    pub(crate) fn http_client(&self, wire: Wire) -> reqwest::Result<reqwest::Client> {
        let unverified = wire == Wire::UnverifiedTls;
        reqwest::Client::builder().danger_accept_invalid_certs(unverified).connect_timeout(CONNECT_LIMIT).build()
    }

    pub(crate) fn uploads_at_once(&self) -> usize {
        self.config.load().uploads_at_once
    }

    /// The places to ask for `image`: mirrors first for Docker Hub, then its own registry.
    async fn endpoints(&self, reference: &Reference) -> Vec<(Reference, Wire)> {
        let wire = self.wire(reference).await;
        let mut places = Vec::new();
        if reference.registry() == "docker.io" {
            for mirror in &self.config.load().mirrors {
                let wire = if mirror.starts_with("http://") { Wire::Plain } else { Wire::Tls };
                let host = mirror.split("://").last().unwrap_or(mirror).trim_end_matches('/');
                places.push((with_registry(reference, host), wire));
            }
        }
        places.push((reference.clone(), wire));
        places
    }

    pub(crate) fn client(&self, reference: &Reference, wire: Wire) -> Client {
        let protocol = if wire == Wire::Plain {
            ClientProtocol::HttpsExcept(vec![reference.resolve_registry().to_owned()])
        } else {
            ClientProtocol::Https
        };
        let Proxies { http, https, none_for } = self.config.load().proxies.clone();
        Client::new(ClientConfig {
            protocol,
            http_proxy: http,
            https_proxy: https,
            no_proxy: none_for,
            connect_timeout: Some(CONNECT_LIMIT),
            read_timeout: Some(READ_LIMIT),
            tls_certs_only: ROOTS.clone(),
            accept_invalid_certificates: wire == Wire::UnverifiedTls,
            ..ClientConfig::default()
        })
    }

    /// Asks what `image` stands for, without pulling it.
    pub(crate) async fn resolve(&self, image: &str, credentials: &Credentials) -> Result<Resolved, PullError> {
        let reference = parse(image)?;
        let (manifest, digest, client, place) = self.manifest(image, &reference, credentials).await?;
        let size_bytes = serde_json::to_vec(&manifest).map_or(0, |bytes| bytes.len() as u64);
        let (media_type, platforms) = match &manifest {
            OciManifest::ImageIndex(index) => {
                (index.media_type.clone(), index.manifests.iter().filter_map(platform_of).collect())
            }
            OciManifest::Image(manifest) => {
                let config = self.config_blob(image, &client, &place, &manifest.config).await?;
                (manifest.media_type.clone(), vec![config.0.platform()])
            }
        };
        let media_type = media_type.unwrap_or_else(|| "application/vnd.oci.image.manifest.v1+json".into());
        Ok(Resolved { digest, media_type, size_bytes, platforms })
    }

    /// All tags of a repository, as its registry names them.
    pub(crate) async fn tags(&self, name: &str, credentials: &Credentials) -> Result<Vec<String>, PullError> {
        let reference = parse(name)?;
        let client = self.client(&reference, self.wire(&reference).await);
        let (auth, mut tags) = (credentials.to_auth(), Vec::<String>::new());
        loop {
            let page = client.list_tags(&reference, &auth, Some(TAGS_A_PAGE), tags.last().map(String::as_str)).await;
            let page = page.map_err(|error| no_manifest(name, &error))?.tags;
            // Some registries give all of them, whatever they are asked for.
            let is_last = page.len() != TAGS_A_PAGE || page.first().is_some_and(|tag| tags.contains(tag));
            tags.extend(page);
            if is_last || tags.len() >= TAGS_MAX {
                tags.dedup();
                return Ok(tags);
            }
        }
    }

    async fn manifest(
        &self,
        image: &str,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<(OciManifest, String, Client, Reference), PullError> {
        let auth = credentials.to_auth();
        let mut last = None;
        for (place, wire) in self.endpoints(reference).await {
            let client = self.client(&place, wire);
            match client.pull_manifest(&place, &auth).await {
                Ok((manifest, digest)) => return Ok((manifest, digest, client, place)),
                Err(error) => last = Some(error),
            }
        }
        Err(match last {
            Some(error) => no_manifest(image, &error),
            None => PullError::Registry { image: image.to_owned(), reason: "no registry is configured".into() },
        })
    }

    async fn config_blob(
        &self,
        image: &str,
        client: &Client,
        place: &Reference,
        descriptor: &OciDescriptor,
    ) -> Result<(ConfigBlob, Vec<u8>), PullError> {
        let mut bytes = Vec::new();
        client.pull_blob(place, descriptor, &mut bytes).await.map_err(|error| registry_error(image, &error))?;
        let config = serde_json::from_slice(&bytes)
            .map_err(|error| PullError::Damaged { image: image.to_owned(), reason: error.to_string() })?;
        Ok((config, bytes))
    }

    /// Pulls `image` for a platform, this host's if none is named; returns it as it is kept.
    pub(crate) async fn pull(
        &self,
        image: &str,
        platform: Option<&Platform>,
        credentials: &Credentials,
        progress: &mpsc::Sender<PullProgress>,
    ) -> Result<Image, PullError> {
        let reference = parse(image)?;
        let (manifest, digest, client, place) = self.manifest(image, &reference, credentials).await?;
        let manifest = match manifest {
            OciManifest::Image(manifest) => manifest,
            OciManifest::ImageIndex(index) => {
                let own = Platform::own();
                let entry = choose(image, platform.unwrap_or(&own), &index.manifests)?;
                let pinned = place.clone_with_digest(entry.digest.clone());
                let (manifest, _) = client
                    .pull_image_manifest(&pinned, &credentials.to_auth())
                    .await
                    .map_err(|error| registry_error(image, &error))?;
                manifest
            }
        };
        let (config, raw) = self.config_blob(image, &client, &place, &manifest.config).await?;
        let actual = config.platform();
        if let Some(platform) = platform.filter(|wanted| !wanted.takes(&actual)) {
            let (image, platform) = (image.to_owned(), platform.to_string());
            return Err(PullError::Platform { image, platform, variants: actual.to_string() });
        }
        if config.rootfs.diff_ids.len() != manifest.layers.len() {
            return Err(PullError::Damaged {
                image: image.to_owned(),
                reason: format!("{} layers for {} digests", manifest.layers.len(), config.rootfs.diff_ids.len()),
            });
        }
        // Of an image that is here, if under another name, nothing comes and nothing is told.
        let all_here = || config.rootfs.diff_ids.iter().all(|diff_id| self.store.has_layer(diff_id));
        let is_here = self.store.find(&manifest.config.digest).is_some() && all_here();
        let layers = manifest.layers.iter().zip(&config.rootfs.diff_ids).filter(|_| !is_here);
        futures::stream::iter(layers.map(Ok))
            .try_for_each_concurrent(self.config.load().downloads_at_once, |(layer, diff_id)| {
                self.layer(image, (&client, &place), layer, diff_id, progress)
            })
            .await?;
        let tags = reference.digest().is_none().then(|| super::normalize(image)).flatten().into_iter().collect();
        let digests = BTreeSet::from([format!("{}@{digest}", super::repository(image))]);
        let kept = self.store.keep_config(&raw, tags, digests);
        let kept = kept.map_err(|cause| PullError::Disk { image: image.to_owned(), cause })?;
        Ok(kept)
    }

    async fn layer(
        &self,
        image: &str,
        (client, place): (&Client, &Reference),
        layer: &OciDescriptor,
        diff_id: &str,
        progress: &mpsc::Sender<PullProgress>,
    ) -> Result<(), PullError> {
        let id: String = layer.digest.chars().skip("sha256:".len()).take(12).collect();
        // Whoever watched may have gone; the pull goes on.
        let step = |status: &str, bytes| PullProgress { id: id.clone(), status: status.to_owned(), bytes };
        let tell = |status: &str| drop(progress.try_send(step(status, None)));
        if !self.store.has_layer(diff_id) {
            tell("Pulling fs layer");
        }
        let _turn = self.under_way.take(diff_id).await;
        if self.store.has_layer(diff_id) {
            tell("Already exists");
            return Ok(());
        }
        let disk = |cause| PullError::Disk { image: image.to_owned(), cause };
        let dir = Incoming(self.store.incoming().map_err(disk)?);
        let archive = dir.0.with_extension("archive");
        let archive = IncomingFile(archive);
        let mut file = tokio::fs::File::create(&archive.0).await.map_err(disk)?;
        let size = u64::try_from(layer.size).unwrap_or(0);
        let told = AtomicU64::new(0);
        let tell_bytes = |done: u64| {
            if done >= told.load(Ordering::Relaxed) + TOLD_EVERY_BYTES {
                told.store(done, Ordering::Relaxed);
                drop(progress.try_send(step("Downloading", Some((done, size)))));
            }
        };
        let downloaded = Download::new(client, place, layer, &mut file).run(tell_bytes).await;
        let size_bytes = downloaded.map_err(|error| match error {
            DownloadError::Disk(cause) => disk(cause),
            other => PullError::Registry { image: image.to_owned(), reason: super::reasons::told(&other) },
        })?;
        tell("Download complete");
        let (from, into, want) = (archive.0.clone(), dir.0.clone(), diff_id.to_owned());
        tokio::task::spawn_blocking(move || {
            let file = std::fs::File::open(&from).map_err(|cause| UnpackError::Io(want.clone(), cause))?;
            unpack::unpack(file, &into, &want)
        })
        .await
        .map_err(|error| disk(std::io::Error::other(error)))??;
        let media_type = super::layer::media_type(&archive.0).map_err(disk)?.to_owned();
        let blob = LayerBlob { digest: layer.digest.clone(), media_type, size_bytes };
        self.store.keep_layer(&dir.0, &archive.0, &blob, diff_id).map_err(disk)?;
        tell("Pull complete");
        Ok(())
    }
}

/// A layer on its way in; gone if it does not arrive.
struct Incoming(PathBuf);

impl Drop for Incoming {
    fn drop(&mut self) {
        // Absent once it was kept.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct IncomingFile(PathBuf);

impl Drop for IncomingFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn parse(image: &str) -> Result<Reference, PullError> {
    image.parse().map_err(|_| PullError::Name(image.to_owned()))
}

fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.starts_with("127.")
}

fn with_registry(reference: &Reference, host: &str) -> Reference {
    let repository = reference.repository().to_owned();
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => Reference::with_digest(host.into(), repository, digest.into()),
        (None, tag) => Reference::with_tag(host.into(), repository, tag.unwrap_or("latest").into()),
    }
}

/// What an entry of an index is for; attestations are for none.
fn platform_of(entry: &ImageIndexEntry) -> Option<Platform> {
    let platform = entry.platform.as_ref().filter(|platform| platform.os.to_string() != "unknown")?;
    let (os, architecture) = (platform.os.to_string(), platform.architecture.to_string());
    Some(Platform { os, architecture, variant: platform.variant.clone().unwrap_or_default() })
}

fn choose<'a>(
    image: &str,
    wanted: &Platform,
    entries: &'a [ImageIndexEntry],
) -> Result<&'a ImageIndexEntry, PullError> {
    platform::best(wanted, entries, platform_of).ok_or_else(|| {
        let variants: Vec<_> = entries.iter().filter_map(platform_of).map(|one| one.to_string()).collect();
        PullError::Platform { image: image.to_owned(), platform: wanted.to_string(), variants: variants.join(", ") }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_told_by_name_and_by_network() {
        let config = RegistryConfig {
            insecure: ["named:5000".to_owned()].into(),
            insecure_subnets: vec!["10.9.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()],
            ..RegistryConfig::default()
        };
        for plain in ["named:5000", "10.9.8.7:5000", "10.9.8.7", "[fd00::1]:5000", "localhost:5000", "127.0.0.1:5000"] {
            assert!(config.is_insecure(plain), "{plain}");
        }
        for other in ["named", "10.8.0.1:5000", "[fd01::1]:5000", "docker.io"] {
            assert!(!config.is_insecure(other), "{other}");
        }
    }

    #[test]
    fn credentials_are_read_from_the_header() {
        let read =
            |json: &str| Credentials::from_header(base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(json).as_bytes());
        assert!(matches!(Credentials::from_header(b""), Ok(Credentials::Anonymous)));
        assert!(matches!(read("{}"), Ok(Credentials::Anonymous)));
        let basic = read(r#"{"username":"me","password":"secret","serveraddress":"x"}"#).unwrap();
        assert!(matches!(&basic, Credentials::Basic { username, .. } if username == "me"));
        assert!(!format!("{basic:?}").contains("secret\""), "a password is never printed");
        assert!(matches!(read(r#"{"identitytoken":"t"}"#), Ok(Credentials::Token(_))));
        assert!(Credentials::from_header(b"%%%").is_err() && read("nonsense").is_err());
    }
}
