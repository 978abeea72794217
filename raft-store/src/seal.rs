//! Encryption at rest: XChaCha20-Poly1305 under a data key that belongs to one manager.
//!
//! The place of a record (tree and key) is authenticated with it, so that records cannot be
//! swapped. The data key lies beside the store in a file of its own, locked while the swarm is.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use skep_api::SecretBytes;
use skep_pki::{KeyLock, LockError};
use zeroize::Zeroizing;

const NONCE_LEN: usize = 24;
const KEY_LEN: usize = 32;
const PLAIN_HEADER: &str = "skep-data-key 1 plain";
/// What it is locked as.
const LOCKED_AS: &str = "data.key";

/// Why the data key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DataKeyError {
    #[error("data key {path} cannot be read or written")]
    Io {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("data key {0} is damaged: restore it from a backup, or let this manager leave and join again")]
    Damaged(PathBuf),
    #[error("data key {path} is locked")]
    Locked {
        path: PathBuf,
        #[source]
        cause: LockError,
    },
}

/// The key that seals a manager's log and snapshots.
#[derive(Clone)]
pub struct DataKey(Zeroizing<[u8; KEY_LEN]>);

impl std::fmt::Debug for DataKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DataKey([secret])")
    }
}

impl DataKey {
    /// Reads the key at `path`, or makes one there (mode 0600) if there is none; locked if there is a lock.
    pub fn load_or_create(path: &Path, lock: Option<&KeyLock>) -> Result<Self, DataKeyError> {
        match fs::read(path) {
            Ok(text) => {
                let locked = |cause| DataKeyError::Locked { path: path.to_owned(), cause };
                let text = KeyLock::open(lock, LOCKED_AS, SecretBytes::new(text)).map_err(locked)?;
                let text = std::str::from_utf8(text.expose()).ok();
                text.and_then(Self::parse).ok_or_else(|| DataKeyError::Damaged(path.to_owned()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let key = Self(Zeroizing::new(rand::random()));
                key.save(path, lock)?;
                Ok(key)
            }
            Err(cause) => Err(DataKeyError::Io { path: path.to_owned(), cause }),
        }
    }

    /// Writes the key to `path`, whole or not at all; locked if there is a lock.
    pub fn save(&self, path: &Path, lock: Option<&KeyLock>) -> Result<(), DataKeyError> {
        let io = |cause| DataKeyError::Io { path: path.to_owned(), cause };
        let plain = Zeroizing::new(format!("{PLAIN_HEADER}\n{}\n", hex::encode(*self.0)));
        let text = lock.map_or_else(|| plain.clone(), |lock| Zeroizing::new(lock.seal(LOCKED_AS, plain.as_bytes())));
        let new = path.with_extension("new");
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new).map_err(io)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
        fs::rename(&new, path).map_err(io)
    }

    fn parse(text: &str) -> Option<Self> {
        let (header, key) = text.split_once('\n')?;
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        hex::decode_to_slice(key.trim(), &mut *bytes).ok()?;
        (header == PLAIN_HEADER).then_some(Self(bytes))
    }
}

/// A record that does not open: another key sealed it, or it was changed.
#[derive(Debug, thiserror::Error)]
#[error("record {place} of the store does not open: it was changed, or another data key sealed it")]
pub(crate) struct SealBroken {
    place: String,
}

/// Seals and opens records.
#[derive(Clone)]
pub(crate) struct Sealer(XChaCha20Poly1305);

impl Sealer {
    pub(crate) fn new(key: &DataKey) -> Self {
        Self(XChaCha20Poly1305::new((&*key.0).into()))
    }

    pub(crate) fn seal(&self, tree: &str, key: &[u8], plain: &[u8]) -> Vec<u8> {
        let nonce: [u8; NONCE_LEN] = rand::random();
        let aad = place_bytes(tree, key);
        let sealed = self
            .0
            .encrypt(XNonce::from_slice(&nonce), Payload { msg: plain, aad: &aad })
            .expect("records are far below the cipher's limit");
        [nonce.as_slice(), &sealed].concat()
    }

    pub(crate) fn open(&self, tree: &str, key: &[u8], sealed: &[u8]) -> Result<Vec<u8>, SealBroken> {
        let broken = || SealBroken { place: format!("{tree}/{}", hex::encode(key)) };
        let (nonce, body) = sealed.split_at_checked(NONCE_LEN).ok_or_else(broken)?;
        let aad = place_bytes(tree, key);
        self.0.decrypt(XNonce::from_slice(nonce), Payload { msg: body, aad: &aad }).map_err(|_| broken())
    }
}

fn place_bytes(tree: &str, key: &[u8]) -> Vec<u8> {
    [tree.as_bytes(), b"/", key].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_record_opens_only_in_its_place_and_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let key = DataKey::load_or_create(&dir.path().join("key"), None).unwrap();
        let again = DataKey::load_or_create(&dir.path().join("key"), None).unwrap();
        let sealed = Sealer::new(&key).seal("log", &[1], b"plain");
        assert_eq!(Sealer::new(&again).open("log", &[1], &sealed).unwrap(), b"plain");
        assert!(!sealed.windows(5).any(|w| w == b"plain"));
        assert!(Sealer::new(&key).open("log", &[2], &sealed).is_err(), "another place");
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(Sealer::new(&key).open("log", &[1], &changed).is_err(), "byte {at} changed");
        }
        assert!(Sealer::new(&key).open("log", &[1], &sealed[..7]).is_err(), "cut");
    }

    #[test]
    fn a_locked_key_opens_with_its_lock_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = DataKey::load_or_create(&path, None).unwrap();
        let lock = KeyLock::generate();
        key.save(&path, Some(&lock)).unwrap();
        assert!(!fs::read_to_string(&path).unwrap().contains(&hex::encode(*key.0)));
        assert_eq!(*DataKey::load_or_create(&path, Some(&lock)).unwrap().0, *key.0);
        for other in [None, Some(&KeyLock::generate())] {
            assert!(DataKey::load_or_create(&path, other).unwrap_err().to_string().contains("is locked"));
        }
    }

    #[test]
    fn a_damaged_key_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, "skep-data-key 1 plain\nzz\n").unwrap();
        assert!(DataKey::load_or_create(&path, None).unwrap_err().to_string().contains("damaged"));
    }
}
