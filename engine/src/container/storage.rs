//! What makes a root of layers, and tells what was changed in it.
//!
//! Layers are kept as overlayfs has them, whatever makes roots of them: so images are the same for all drivers, and
//! containers of several can stand side by side. A container keeps the driver that it was made with.

mod overlay;
mod plain;

use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::container::rootfs::ContainerDirs;
pub(crate) use overlay::Overlay2;
use plain::{Btrfs, Vfs};

/// How roots are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StorageDriver {
    /// The kernel shows layers as one, and what is written goes to one more.
    #[default]
    Overlay2,
    /// Each root is a copy of all its layers: slow and large, and works everywhere.
    Vfs,
    /// Each root is a snapshot: for data directories on btrfs.
    Btrfs,
}

impl StorageDriver {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Overlay2 => "overlay2",
            Self::Vfs => "vfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// The driver of a name, if there is one.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Overlay2, Self::Vfs, Self::Btrfs].into_iter().find(|driver| driver.as_str() == name)
    }

    /// The driver that is asked for, if roots can be made below `dir` by it; none asked: one that can.
    pub(crate) fn choose(asked: Option<Self>, dir: &Path) -> io::Result<Self> {
        let driver = asked.unwrap_or_default();
        match (driver.try_in(dir), asked) {
            (Ok(()), _) => Ok(driver),
            (Err(error), Some(_)) => Err(error),
            (Err(error), None) => {
                let (dir, driver) = (dir.display(), driver.as_str());
                tracing::warn!(%dir, %error, "{driver} cannot be used here: containers' files are copied instead (vfs)");
                Ok(Self::Vfs)
            }
        }
    }

    fn try_in(self, dir: &Path) -> io::Result<()> {
        match self {
            Self::Overlay2 => overlay::try_in(dir),
            Self::Vfs => Ok(()),
            Self::Btrfs => plain::is_btrfs(dir),
        }
    }

    /// Makes roots of the layers of a data directory.
    pub(crate) fn open(self, data_dir: &Path) -> Arc<dyn Storage> {
        match self {
            Self::Overlay2 => Arc::new(Overlay2),
            Self::Vfs => Arc::new(Vfs),
            Self::Btrfs => Arc::new(Btrfs::new(data_dir)),
        }
    }
}

/// Makes roots in one way. What it does to a container's directories can be done twice.
pub(crate) trait Storage: Debug + Send + Sync {
    /// Makes the root of `layers`, the lowest first, unless it is there.
    fn raise(&self, dirs: &ContainerDirs, layers: &[PathBuf]) -> io::Result<()>;

    /// What was changed in the root since it was made, as overlayfs has it: in the directory
    /// [`upper`](ContainerDirs::upper), which is not there if it never was made.
    fn note_changes(&self, dirs: &ContainerDirs) -> io::Result<()>;

    /// Takes the root down; what was written in it stays.
    fn lower(&self, dirs: &ContainerDirs) -> io::Result<()>;

    /// Removes what stands on layers that are gone; `is_there` takes the names of their directories.
    fn prune(&self, is_there: &dyn Fn(&str) -> bool) -> io::Result<()> {
        let _ = is_there;
        Ok(())
    }
}
