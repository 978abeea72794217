//! Local volumes: named directories that outlive their containers.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};
use skep_api::Timestamp;

use crate::disk;
use crate::mounts::{is_mounted, unmount};
use crate::tree::{Copier, copy_attributes};

/// A volume as it is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub created: Timestamp,
    /// Made for one container that did not name it.
    pub anonymous: bool,
    /// What is mounted on it while containers use it: `type`, `device` and `o`, as mount(8) takes them.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
}

/// Why a volume cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error(
        "{0:?} is no volume name: it has two or more of a-z, A-Z, 0-9, _, . and -, and begins with a letter or digit"
    )]
    Name(String),
    #[error("invalid option: {0:?}: volumes take type, device and o")]
    Option(String),
    #[error("missing required option: {0:?}: type and device are given together, and o with both")]
    MissingOption(&'static str),
    #[error("volume {0} has been made with other options: remove it, or use the same ones")]
    Differs(String),
    #[error("volume {0} cannot be stored")]
    Disk(String, #[source] io::Error),
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

    pub(crate) fn get(&self, name: &str) -> Option<Volume> {
        let bytes = is_name(name).then(|| fs::read(self.dir.join(name).join("volume.json")).ok()).flatten()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// All volumes, by name.
    pub(crate) fn list(&self) -> Vec<Volume> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut volumes: Vec<_> = entries.filter_map(|entry| self.get(&entry.file_name().to_string_lossy())).collect();
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        volumes
    }

    /// Makes the volume unless it is there; says whether it is new.
    pub(crate) fn ensure(&self, volume: &Volume) -> Result<bool, VolumeError> {
        if !is_name(&volume.name) {
            return Err(VolumeError::Name(volume.name.clone()));
        }
        if let Some(key) = volume.options.keys().find(|key| !matches!(key.as_str(), "type" | "device" | "o")) {
            return Err(VolumeError::Option(key.clone()));
        }
        let missing = ["device", "type"].into_iter().find(|&name| !volume.options.contains_key(name));
        if let Some(name) = missing.filter(|_| !volume.options.is_empty()) {
            return Err(VolumeError::MissingOption(name));
        }
        if let Some(there) = self.get(&volume.name) {
            let same = volume.options.is_empty() || volume.options == there.options;
            return if same { Ok(false) } else { Err(VolumeError::Differs(volume.name.clone())) };
        }
        let make = || {
            fs::create_dir_all(self.data_dir(&volume.name))?;
            disk::write_whole(&self.dir.join(&volume.name).join("volume.json"), &serde_json::to_vec(volume)?)
        };
        make().map(|()| true).map_err(|cause| VolumeError::Disk(volume.name.clone(), cause))
    }

    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        self.unmount(name)?;
        fs::remove_dir_all(self.dir.join(name))
    }

    /// Mounts what the volume's options say, unless it is mounted; tells whether they ask for a file system of its own.
    pub(crate) fn mount(&self, name: &str) -> io::Result<bool> {
        let Some(volume) = self.get(name).filter(|volume| !volume.options.is_empty()) else { return Ok(false) };
        let target = self.data_dir(name);
        if is_mounted(&target)? {
            return Ok(true);
        }
        let option = |key: &str| volume.options.get(key).map_or("", String::as_str);
        let (flags, data) = mount_flags(option("o"));
        let (kind, device) = (option("type"), option("device"));
        let kind = (!matches!(kind, "" | "none" | "bind")).then_some(kind);
        mount(Some(device), &target, kind, flags, Some(data.as_str())).map(|()| true).map_err(|error| {
            let reason = format!("volume {name}: {device:?} cannot be mounted as {:?}: {error}", option("type"));
            io::Error::new(io::Error::from(error).kind(), reason)
        })
    }

    /// Takes down what [`mount`](Self::mount) mounted; doing so twice is harmless.
    pub(crate) fn unmount(&self, name: &str) -> io::Result<()> {
        if self.get(name).is_none_or(|volume| volume.options.is_empty()) {
            return Ok(());
        }
        unmount(&self.data_dir(name))
    }
}

/// The flags among mount(8)'s options, and the rest for the file system.
fn mount_flags(options: &str) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "rw" | "defaults" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

fn is_name(name: &str) -> bool {
    name.len() >= 2
        && name.len() <= 255
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

pub(crate) fn is_empty(volume: &Path) -> io::Result<bool> {
    Ok(fs::read_dir(volume)?.next().is_none())
}

/// Fills an empty volume with what the image has in its place; one that holds something is left alone.
pub(crate) fn populate(volume: &Path, from: &Path) -> io::Result<()> {
    // A part of a volume may be a file.
    if !from.is_dir() || !volume.is_dir() || !is_empty(volume)? {
        return Ok(());
    }
    Copier::default().copy_children(from, volume)?;
    // Who names it by a link, as those to open files are, means what that leads to.
    copy_attributes(from, &volume.join("."), &fs::metadata(from)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn a_volume_is_made_once_and_keeps_its_options() {
        let dir = tempfile::tempdir().unwrap();
        let store = VolumeStore::open(dir.path()).unwrap();
        let volume = |name: &str, options: &[(&str, &str)]| Volume {
            name: name.into(),
            options: options.iter().map(|&(k, v)| (k.into(), v.into())).collect(),
            ..Volume::default()
        };
        assert!(store.ensure(&volume("data", &[("type", "tmpfs"), ("device", "tmpfs")])).unwrap());
        assert!(!store.ensure(&volume("data", &[])).unwrap());
        assert!(matches!(
            store.ensure(&volume("data", &[("type", "nfs"), ("device", ":/d")])),
            Err(VolumeError::Differs(_))
        ));
        assert!(matches!(store.ensure(&volume("x", &[])), Err(VolumeError::Name(_))));
        assert!(matches!(store.ensure(&volume("../up", &[])), Err(VolumeError::Name(_))));
        assert!(matches!(store.ensure(&volume("more", &[("size", "1")])), Err(VolumeError::Option(_))));
        assert!(matches!(store.ensure(&volume("more", &[("type", "nfs")])), Err(VolumeError::MissingOption("device"))));
        assert!(matches!(store.ensure(&volume("more", &[("device", "/d")])), Err(VolumeError::MissingOption("type"))));
        assert_eq!(store.list().len(), 1);
        store.remove("data").unwrap();
        assert!(store.list().is_empty());
    }

    #[test]
    fn an_empty_volume_is_filled_and_a_full_one_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (image, volume) = (dir.path().join("image"), dir.path().join("volume"));
        fs::create_dir_all(image.join("sub")).unwrap();
        fs::create_dir(&volume).unwrap();
        fs::write(image.join("sub/file"), "text").unwrap();
        fs::set_permissions(image.join("sub/file"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("/etc/passwd", image.join("link")).unwrap();
        let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        fs::File::open(&image).unwrap().set_modified(long_ago).unwrap();
        let opened = fs::File::open(&volume).unwrap();
        populate(Path::new(&format!("/proc/self/fd/{}", opened.as_raw_fd())), &image).unwrap();
        assert_eq!(fs::metadata(&volume).unwrap().modified().unwrap(), long_ago);
        assert_eq!(fs::read_to_string(volume.join("sub/file")).unwrap(), "text");
        assert_eq!(fs::metadata(volume.join("sub/file")).unwrap().mode() & 0o777, 0o640);
        assert_eq!(fs::read_link(volume.join("link")).unwrap(), Path::new("/etc/passwd"));
        fs::remove_file(volume.join("link")).unwrap();
        populate(&volume, &image).unwrap();
        assert!(!volume.join("link").exists());
    }
}
