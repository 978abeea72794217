//! Storage drivers of the Container Storage Interface, version 1, as managers and nodes speak to them.
//!
//! A driver is a program that listens on a socket in the drivers' directory; whoever runs it, and how, is its own affair
//! (a container of this very host will do). The socket's name is the driver's: `NAME.sock`, or `NAME/csi.sock` as
//! drivers made for Kubernetes have it. The calls are as the specification has them, which makes each of them safe to
//! repeat; <https://github.com/container-storage-interface/spec>.

mod driver;
pub mod interface;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use skep_api::with_causes;

pub use driver::{Controls, Driver, Secrets};

/// The directory in which drivers have their sockets.
#[derive(Clone, Debug)]
pub struct Drivers {
    dir: Arc<Path>,
}

/// Why a storage driver did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CsiError {
    #[error("storage driver {name} is not there: its socket is to be {}", path.display())]
    NoDriver { name: String, path: PathBuf },
    #[error("storage driver {name} cannot be reached at {}: {cause}", path.display())]
    Unreachable { name: String, path: PathBuf, cause: String },
    #[error("storage driver {name} refused {call}: {message} ({code:?})")]
    Refused { name: String, call: &'static str, message: String, code: tonic::Code },
    #[error("storage driver {name} gave no answer to {call} within {seconds} s")]
    TimedOut { name: String, call: &'static str, seconds: u64 },
    #[error("storage driver {name} answered {call} without {missing}")]
    Incomplete { name: String, call: &'static str, missing: &'static str },
}

impl Drivers {
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    /// The drivers that have a socket there; none if the directory cannot be read.
    #[must_use]
    pub fn names(&self) -> BTreeSet<String> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return BTreeSet::new() };
        let name = |entry: std::fs::DirEntry| {
            let file = entry.file_name().into_string().ok()?;
            let name = file.strip_suffix(".sock").unwrap_or(&file).to_owned();
            self.socket(&name).exists().then_some(name)
        };
        entries.flatten().filter_map(name).collect()
    }

    /// Connects to a driver.
    ///
    /// # Errors
    ///
    /// There is none of that name, or it does not take the connection.
    pub async fn connect(&self, name: &str) -> Result<Driver, CsiError> {
        let path = self.socket(name);
        if !path.exists() {
            return Err(CsiError::NoDriver { name: name.to_owned(), path });
        }
        let connected = Driver::connect(name, &path).await;
        connected.map_err(|error| CsiError::Unreachable { name: name.to_owned(), path, cause: with_causes(&error) })
    }

    fn socket(&self, name: &str) -> PathBuf {
        let below = self.dir.join(name).join("csi.sock");
        if below.exists() { below } else { self.dir.join(format!("{name}.sock")) }
    }
}
