//! A node's certificate and key, in memory and on disk: `swarm-root-ca.crt`, `swarm-node.crt`,
//! `swarm-node.key` in the node's `certificates` directory.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use skep_api::{SecretBytes, Timestamp};

use crate::ca::{CaError, IssuerInfo};
use crate::lock::{KeyLock, LockError};
use crate::peer::{PeerIdentity, PeerIdentityError};

const ROOT_FILE: &str = "swarm-root-ca.crt";
const CERTIFICATE_FILE: &str = "swarm-node.crt";
const KEY_FILE: &str = "swarm-node.key";

/// Why a node's identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{path} cannot be read or written")]
    Io {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("the node's certificate cannot be used")]
    Certificate(#[from] PeerIdentityError),
    #[error("the node's certificate file holds no certificate")]
    NoCertificate,
    #[error("a key could not be made")]
    Key(#[source] rcgen::Error),
}

/// A key that has no certificate yet.
pub struct PendingIdentity {
    key: KeyPair,
}

impl std::fmt::Debug for PendingIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PendingIdentity([secret])")
    }
}

impl PendingIdentity {
    /// Makes a new key; it never leaves the node.
    pub fn generate() -> Result<Self, IdentityError> {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(|key| Self { key }).map_err(IdentityError::Key)
    }

    /// The request to have it certified. It names nobody: the CA decides that.
    pub fn request_pem(&self) -> Result<String, IdentityError> {
        CertificateParams::default()
            .serialize_request(&self.key)
            .and_then(|request| request.pem())
            .map_err(IdentityError::Key)
    }

    /// Joins the key with the certificate that the CA made for it.
    pub fn certified(self, certificate_pem: &str, root_pem: &str) -> Result<NodeIdentity, IdentityError> {
        NodeIdentity::new(certificate_pem, SecretBytes::new(self.key.serialize_pem().into_bytes()), root_pem)
    }
}

/// A node's certificate, key and root.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    pub peer: PeerIdentity,
    pub certificate_pem: String,
    pub key_pem: SecretBytes,
    pub root_pem: String,
}

impl NodeIdentity {
    fn new(certificate_pem: &str, key_pem: SecretBytes, root_pem: &str) -> Result<Self, IdentityError> {
        let certificate =
            CertificateDer::from_pem_slice(certificate_pem.as_bytes()).map_err(|_| IdentityError::NoCertificate)?;
        Ok(Self {
            peer: PeerIdentity::from_certificate(&certificate)?,
            certificate_pem: certificate_pem.to_owned(),
            key_pem,
            root_pem: root_pem.to_owned(),
        })
    }

    /// Reads the identity in `dir`; `None` if the node has none yet.
    pub fn load(dir: &Path, lock: Option<&KeyLock>) -> Result<Option<Self>, LockError> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).map_err(|cause| IdentityError::Io { path, cause })
        };
        if !dir.join(CERTIFICATE_FILE).exists() {
            return Ok(None);
        }
        let key = KeyLock::open(lock, KEY_FILE, SecretBytes::new(read(KEY_FILE)?.into_bytes()))?;
        Ok(Self::new(&read(CERTIFICATE_FILE)?, key, &read(ROOT_FILE)?).map(Some)?)
    }

    /// Writes the identity into `dir` (mode 0700), each file whole or not at all, the certificate last; the key locked if
    /// there is a lock.
    pub fn save(&self, dir: &Path, lock: Option<&KeyLock>) -> Result<(), IdentityError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|cause| IdentityError::Io { path: dir.to_owned(), cause })?;
        write_whole(&dir.join(ROOT_FILE), self.root_pem.as_bytes(), 0o644)?;
        let key = lock.map(|lock| SecretBytes::new(lock.seal(KEY_FILE, self.key_pem.expose()).into_bytes()));
        write_whole(&dir.join(KEY_FILE), key.as_ref().unwrap_or(&self.key_pem).expose(), 0o600)?;
        write_whole(&dir.join(CERTIFICATE_FILE), self.certificate_pem.as_bytes(), 0o644)
    }

    /// Who signed the certificate: the root, or one that is to become it and that the root vouches for.
    pub fn issuer(&self) -> Result<IssuerInfo, CaError> {
        const END: &str = "-----END CERTIFICATE-----";
        let vouched = self.certificate_pem.split_once(END).map_or("", |(_, rest)| rest.trim());
        IssuerInfo::of_pem(if vouched.is_empty() { &self.root_pem } else { vouched })
    }

    /// The same node under another root.
    #[must_use]
    pub fn with_root(&self, root_pem: &str) -> Self {
        Self { root_pem: root_pem.to_owned(), ..self.clone() }
    }

    /// When to renew: somewhere between half and four fifths of the certificate's life, so that
    /// the nodes of a swarm do not all come at once. `jitter` is from 0 to 1.
    #[must_use]
    pub fn renew_after(&self, now: SystemTime, jitter: f64) -> Duration {
        let life = self.peer.not_after.since(self.peer.not_before);
        let at = self.peer.not_before.plus(life.mul_f64(0.5 + 0.3 * jitter.clamp(0.0, 1.0)));
        at.since(Timestamp::from_system(now))
    }
}

/// Writes a file, whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IdentityError> {
    let io = |cause| IdentityError::Io { path: path.to_owned(), cause };
    let new = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new).map_err(io)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io)?;
    fs::rename(&new, path).map_err(io)
}
