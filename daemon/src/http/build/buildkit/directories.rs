//! Clients' directories as they were at the last build, so that only what has changed comes again.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

/// Directories that are kept; those that were not used for longest go first.
const KEPT_MAX: usize = 32;

pub(super) struct Directories {
    dir: PathBuf,
    in_use: Arc<Mutex<BTreeSet<PathBuf>>>,
}

/// A directory in use, for nobody else until it is dropped.
pub(super) struct Kept {
    path: PathBuf,
    in_use: Arc<Mutex<BTreeSet<PathBuf>>>,
}

impl Kept {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.path);
    }
}

impl Directories {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, in_use: Arc::default() }
    }

    /// The directory that a client calls so, and says that it is the same by `key`; none if another build has it.
    pub(super) fn take(&self, key: &str, name: &str) -> Option<Kept> {
        if key.is_empty() {
            return None;
        }
        let path = self.dir.join(hex::encode(Sha256::digest(format!("{key}\0{name}"))));
        {
            let mut in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
            if !in_use.insert(path.clone()) {
                return None;
            }
        }
        let kept = Kept { path, in_use: self.in_use.clone() };
        let used = fs::create_dir_all(&kept.path)
            .and_then(|()| fs::File::open(&kept.path)?.set_modified(SystemTime::now()))
            .inspect_err(|error| tracing::warn!(%error, "a build's context is not kept"));
        self.shrink(KEPT_MAX);
        used.is_ok().then_some(kept)
    }

    /// All that are kept, those not used for longest first.
    fn all(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let dated = |entry: fs::DirEntry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()));
        let mut all: Vec<_> = entries.filter_map(dated).collect();
        all.sort();
        all.into_iter().map(|(_, path)| path).collect()
    }

    /// Removes those that are not in use until at most `most` are left; returns the bytes that it came to.
    fn shrink(&self, most: usize) -> u64 {
        tokio::task::block_in_place(|| self.remove_surplus(most))
    }

    fn remove_surplus(&self, most: usize) -> u64 {
        let all = self.all();
        let mut surplus = all.len().saturating_sub(most);
        let mut bytes = 0;
        for path in all {
            if surplus == 0 {
                break;
            }
            // Nobody can take it meanwhile.
            if !self.in_use.lock().unwrap_or_else(PoisonError::into_inner).insert(path.clone()) {
                continue;
            }
            let gone = Kept { path, in_use: self.in_use.clone() };
            bytes += skep_engine::bytes_below(gone.path());
            if let Err(error) = fs::remove_dir_all(gone.path()) {
                tracing::warn!(%error, "a build's context was not removed");
            }
            surplus -= 1;
        }
        bytes
    }

    pub(super) fn prune(&self) -> u64 {
        self.shrink(0)
    }

    /// What is kept, and its bytes.
    pub(super) fn usage(&self) -> Vec<(String, u64)> {
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let measured = || self.all().iter().map(|path| (name(path), skep_engine::bytes_below(path))).collect();
        tokio::task::block_in_place(measured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_one_build_s_at_a_time_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::new(dir.path().join("kept"));
        assert!(directories.take("", "context").is_none(), "nothing says that it is the same");
        let first = directories.take("key", "context").unwrap();
        assert!(directories.take("key", "context").is_none());
        fs::write(first.path().join("file"), "12345").unwrap();
        assert_ne!(directories.take("key", "other").unwrap().path(), first.path());
        assert!(directories.prune() < 5 && first.path().join("file").exists(), "it is in use");
        let path = first.path().to_owned();
        drop(first);
        assert_eq!(directories.take("key", "context").unwrap().path(), path);
        assert!(path.join("file").exists());
        assert!(directories.prune() >= 5 && directories.usage().is_empty());
    }

    #[test]
    fn those_not_used_for_longest_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::new(dir.path().to_owned());
        let paths: Vec<_> = (0..KEPT_MAX + 2)
            .map(|number| {
                let kept = directories.take("key", &number.to_string()).unwrap();
                let age = std::time::Duration::from_secs(1000 - number as u64);
                fs::File::open(kept.path()).unwrap().set_modified(SystemTime::now() - age).unwrap();
                kept.path().to_owned()
            })
            .collect();
        let left: Vec<_> = paths.iter().map(|path| path.exists()).collect();
        assert_eq!(left.iter().filter(|left| **left).count(), KEPT_MAX);
        assert!(!left[0] && !left[1] && left[2]);
    }
}
