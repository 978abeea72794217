//! The node's own keys: kept on its disk, made anew again and again, and never lost sight of by its
//! peers while that happens.
//!
//! A new key is told to the peers before it is used, and the old one is taken for a while after: at every
//! moment each side holds a tunnel that the other understands.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use boringtun::x25519::{PublicKey, StaticSecret};
use skep_api::SecretBytes;

const KEY_LEN: usize = 32;
/// How long peers have to hear of a key before it is used, and the old one is still taken after.
const OVERLAP: Duration = Duration::from_secs(60);

/// How many keys there are, and which is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// One.
    Settled,
    /// The second is the next one: peers hear of it.
    Announced,
    /// The second is the last one: peers let go of it.
    Replaced,
}

/// The keys of a node; the first is the one in use.
#[derive(Debug)]
pub(crate) struct KeyRing {
    file: PathBuf,
    keys: Vec<SecretBytes>,
    phase: Phase,
}

impl KeyRing {
    /// Reads the keys; makes the first one if there is none.
    pub(crate) fn open(file: &Path) -> io::Result<Self> {
        let keys: Vec<SecretBytes> = match fs::read(file) {
            Ok(bytes) if (1..=2).contains(&(bytes.len() / KEY_LEN)) && bytes.len() % KEY_LEN == 0 => {
                bytes.chunks(KEY_LEN).map(|key| SecretBytes::new(key.to_vec())).collect()
            }
            Ok(_) => {
                let why = format!("{} is damaged: remove it", file.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let first = vec![new_key()];
                save(file, &first)?;
                first
            }
            Err(error) => return Err(error),
        };
        // Whatever the second is, to let go of it is right: if it was to be the next one, another follows.
        let phase = if keys.len() == 2 { Phase::Replaced } else { Phase::Settled };
        Ok(Self { file: file.to_owned(), keys, phase })
    }

    pub(crate) fn keys(&self) -> &[SecretBytes] {
        &self.keys
    }

    /// What peers are to know.
    pub(crate) fn public(&self) -> Vec<[u8; KEY_LEN]> {
        self.keys.iter().filter_map(public_key).collect()
    }

    /// How long to wait before the next [`step`](Self::step), if a key is to last `period`; `None`: for ever.
    pub(crate) fn pause(&self, period: Duration) -> Option<Duration> {
        let overlap = OVERLAP.min(period / 4);
        match self.phase {
            Phase::Settled => (!period.is_zero()).then(|| period.saturating_sub(overlap * 2)),
            Phase::Announced | Phase::Replaced => Some(overlap),
        }
    }

    /// Goes on: tells of a new key, uses it, lets go of the old one. What cannot be kept on disk does not
    /// happen: a key that peers were not told of must not be used.
    pub(crate) fn step(&mut self) -> io::Result<()> {
        let mut keys = self.keys.clone();
        let phase = match self.phase {
            Phase::Settled => {
                keys.push(new_key());
                Phase::Announced
            }
            Phase::Announced => {
                keys.reverse();
                Phase::Replaced
            }
            Phase::Replaced => {
                keys.truncate(1);
                Phase::Settled
            }
        };
        save(&self.file, &keys)?;
        (self.keys, self.phase) = (keys, phase);
        Ok(())
    }
}

fn save(file: &Path, keys: &[SecretBytes]) -> io::Result<()> {
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    let next = file.with_extension("new");
    let mut written = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
    for key in keys {
        io::Write::write_all(&mut written, key.expose())?;
    }
    written.sync_all()?;
    fs::rename(next, file)
}

fn new_key() -> SecretBytes {
    SecretBytes::new(rand::random::<[u8; KEY_LEN]>().to_vec())
}

/// A key as the tunnels take it; `None` if it is none.
pub(crate) fn private_key(key: &SecretBytes) -> Option<StaticSecret> {
    <[u8; KEY_LEN]>::try_from(key.expose()).ok().map(StaticSecret::from)
}

fn public_key(key: &SecretBytes) -> Option<[u8; KEY_LEN]> {
    private_key(key).map(|private| *PublicKey::from(&private).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_cannot_be_kept_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("swarm");
        let mut ring = KeyRing::open(&place.join("overlay.key")).unwrap();
        let before = ring.public();
        fs::remove_dir_all(&place).unwrap();
        fs::write(&place, "in the way").unwrap();
        for _ in 0..3 {
            assert!(ring.step().is_err());
            assert_eq!((ring.public(), ring.phase), (before.clone(), Phase::Settled));
        }
        fs::remove_file(&place).unwrap();
        ring.step().unwrap();
        assert_eq!((ring.public().len(), ring.public()[0]), (2, before[0]));
    }

    #[test]
    fn a_key_is_told_of_before_it_is_used_and_taken_for_a_while_after() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("overlay.key");
        let mut ring = KeyRing::open(&file).unwrap();
        let first = ring.public();
        assert_eq!(first, KeyRing::open(&file).unwrap().public(), "it is kept");
        ring.step().unwrap();
        let both = ring.public();
        assert_eq!((both.len(), both[0]), (2, first[0]), "the old one is still in use");
        ring.step().unwrap();
        assert_eq!(ring.public(), [both[1], both[0]]);
        // A daemon that starts in between goes on with the one in use.
        assert_eq!(KeyRing::open(&file).unwrap().public(), ring.public());
        ring.step().unwrap();
        assert_eq!(ring.public(), [both[1]]);
        assert_eq!(ring.pause(Duration::ZERO), None);
        assert_eq!(ring.pause(Duration::from_secs(8)), Some(Duration::from_secs(4)));
        fs::write(&file, [1; 33]).unwrap();
        assert!(KeyRing::open(&file).unwrap_err().to_string().contains("damaged"));
    }
}
