//! How a manager's own keys are locked on disk while its swarm is (`--autolock`).
//!
//! The unlock key, which users keep, opens one file alone: the lock. What is in it opens the keys of the manager, each in
//! a file of its own. So another unlock key takes writing one file, whole or not at all, and what a crash leaves of
//! locking is a mixture of files that are locked and not, which opens as well.

use std::fs;
use std::path::Path;
use std::str::FromStr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use skep_api::SecretBytes;
use zeroize::Zeroizing;

use crate::identity::{IdentityError, write_whole};

const KEY_LEN: usize = 32;
const NONCE_LEN: usize = 24;
const PREFIX: &str = "SWMKEY-1-";
const HEADER: &str = "skep-locked 1";
/// What the lock's own content is sealed as.
const LOCK: &str = "lock";

/// Why something stays locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("an unlock key is {PREFIX} and 43 letters: get it from 'swarm unlock-key' on another manager")]
    NotAKey,
    #[error("{0} does not open: another key locked it, or it was changed")]
    DoesNotOpen(String),
    #[error(transparent)]
    File(#[from] IdentityError),
}

/// The key that users keep, the same for all managers of a swarm.
#[derive(Clone, PartialEq, Eq)]
pub struct UnlockKey(Zeroizing<[u8; KEY_LEN]>);

impl UnlockKey {
    #[must_use]
    pub fn generate() -> Self {
        Self(Zeroizing::new(rand::random()))
    }

    /// As users write it.
    #[must_use]
    pub fn expose(&self) -> SecretBytes {
        SecretBytes::new(format!("{PREFIX}{}", BASE64_STANDARD_NO_PAD.encode(*self.0)).into_bytes())
    }
}

impl std::fmt::Debug for UnlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UnlockKey([secret])")
    }
}

impl FromStr for UnlockKey {
    type Err = LockError;

    fn from_str(text: &str) -> Result<Self, LockError> {
        let encoded = text.trim().strip_prefix(PREFIX).ok_or(LockError::NotAKey)?;
        let bytes = Zeroizing::new(BASE64_STANDARD_NO_PAD.decode(encoded).map_err(|_| LockError::NotAKey)?);
        let bytes = bytes.as_slice().try_into().map_err(|_| LockError::NotAKey)?;
        Ok(Self(Zeroizing::new(bytes)))
    }
}

/// What locks a manager's keys.
#[derive(Clone)]
pub struct KeyLock(Zeroizing<[u8; KEY_LEN]>);

impl std::fmt::Debug for KeyLock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyLock([secret])")
    }
}

impl KeyLock {
    #[must_use]
    pub fn generate() -> Self {
        Self(Zeroizing::new(rand::random()))
    }

    /// Opens the lock in the file at `path`.
    pub fn load(path: &Path, key: &UnlockKey) -> Result<Self, LockError> {
        let text = fs::read_to_string(path).map_err(|cause| IdentityError::Io { path: path.to_owned(), cause })?;
        let inner = open(&key.0, LOCK, &text)?;
        let inner = inner.expose().try_into().map_err(|_| LockError::DoesNotOpen(LOCK.into()))?;
        Ok(Self(Zeroizing::new(inner)))
    }

    /// Writes the lock to the file at `path`, for who has the key.
    pub fn save(&self, path: &Path, key: &UnlockKey) -> Result<(), LockError> {
        Ok(write_whole(path, seal(&key.0, LOCK, &*self.0).as_bytes(), 0o600)?)
    }

    /// The text of a file called `name` that holds `plain`, locked.
    #[must_use]
    pub fn seal(&self, name: &str, plain: &[u8]) -> String {
        seal(&self.0, name, plain)
    }

    /// What a file called `name` holds: as it is, if it is not locked.
    pub fn open(lock: Option<&Self>, name: &str, text: SecretBytes) -> Result<SecretBytes, LockError> {
        match (std::str::from_utf8(text.expose()), lock) {
            (Ok(locked), Some(lock)) if locked.starts_with(HEADER) => open(&lock.0, name, locked),
            (Ok(locked), None) if locked.starts_with(HEADER) => Err(LockError::DoesNotOpen(name.to_owned())),
            _ => Ok(text),
        }
    }
}

fn seal(key: &[u8; KEY_LEN], name: &str, plain: &[u8]) -> String {
    let nonce: [u8; NONCE_LEN] = rand::random();
    let payload = Payload { msg: plain, aad: name.as_bytes() };
    let sealed = XChaCha20Poly1305::new(key.into())
        .encrypt(XNonce::from_slice(&nonce), payload)
        .expect("keys are far below the cipher's limit");
    format!("{HEADER}\n{}\n", BASE64_STANDARD_NO_PAD.encode([nonce.as_slice(), &sealed].concat()))
}

fn open(key: &[u8; KEY_LEN], name: &str, text: &str) -> Result<SecretBytes, LockError> {
    let opened = || {
        let (header, body) = text.split_once('\n')?;
        let bytes = BASE64_STANDARD_NO_PAD.decode(body.trim()).ok().filter(|_| header == HEADER)?;
        let (nonce, sealed) = bytes.split_at_checked(NONCE_LEN)?;
        let payload = Payload { msg: sealed, aad: name.as_bytes() };
        XChaCha20Poly1305::new(key.into()).decrypt(XNonce::from_slice(nonce), payload).ok()
    };
    opened().map(SecretBytes::new).ok_or_else(|| LockError::DoesNotOpen(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_locked_opens_with_its_key_alone_and_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let (key, other) = (UnlockKey::generate(), UnlockKey::generate());
        let text = String::from_utf8(key.expose().expose().to_vec()).unwrap();
        assert_eq!((text.len(), text.parse::<UnlockKey>().unwrap() == key), (PREFIX.len() + 43, true));
        let lock = KeyLock::generate();
        lock.save(&path, &key).unwrap();
        assert!(KeyLock::load(&path, &other).is_err());
        let again = KeyLock::load(&path, &key).unwrap();
        let sealed = || SecretBytes::new(lock.seal("a", b"plain").into_bytes());
        assert_eq!(KeyLock::open(Some(&again), "a", sealed()).unwrap().expose(), b"plain");
        assert!(KeyLock::open(Some(&again), "b", sealed()).is_err(), "another place");
        assert!(KeyLock::open(None, "a", sealed()).is_err());
        assert!(!sealed().expose().windows(5).any(|part| part == b"plain"));
        let plain = SecretBytes::new(b"plain".to_vec());
        assert_eq!(KeyLock::open(Some(&again), "a", plain.clone()).unwrap(), plain, "not locked yet");
        // Another unlock key opens the same.
        lock.save(&path, &other).unwrap();
        assert!(KeyLock::load(&path, &key).is_err());
        assert_eq!(*KeyLock::load(&path, &other).unwrap().0, *lock.0);
        for wrong in ["", "SWMKEY-1-", "SWMKEY-1-AAAA", "SWMTKN-1-a-b"] {
            assert!(wrong.parse::<UnlockKey>().unwrap_err().to_string().contains("SWMKEY-1-"), "{wrong}");
        }
    }
}
