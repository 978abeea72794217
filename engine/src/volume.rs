//! Local volumes: named directories that outlive their containers.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use skep_api::Timestamp;

use crate::disk;

/// A volume as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Volume {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) created: Timestamp,
    /// Made for one container, and gone with it.
    pub(crate) anonymous: bool,
}

/// The volumes below one directory.
#[derive(Debug)]
pub(crate) struct VolumeStore {
    dir: PathBuf,
}

impl VolumeStore {
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Where the volume's data lies.
    pub(crate) fn data_dir(&self, name: &str) -> PathBuf {
        self.dir.join(name).join("_data")
    }

    /// Makes the volume unless it is there; says whether it is new.
    pub(crate) fn ensure(&self, volume: &Volume) -> io::Result<bool> {
        if !is_name(&volume.name) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{:?} is no volume name: letters, digits, _, . and - are allowed", volume.name),
            ));
        }
        let new = !self.data_dir(&volume.name).exists();
        if new {
            fs::create_dir_all(self.data_dir(&volume.name))?;
            disk::write_whole(&self.dir.join(&volume.name).join("volume.json"), &serde_json::to_vec(volume)?)?;
        }
        Ok(new)
    }
}

fn is_name(name: &str) -> bool {
    name.len() >= 2
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}
