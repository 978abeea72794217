//! The program that is its own helper: shims and archivers are the daemon's binary, started again.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use tokio::process::Command;

use crate::sys;

/// Starts helpers. Some of them show themselves to containers for a moment, in `/proc/PID/exe`; there
/// they are a view of the binary that cannot be written (CVE-2019-5736).
#[derive(Debug)]
pub(crate) struct HelperProgram {
    path: PathBuf,
    /// None, where the kernel (before 5.12) has no such views.
    sealed: Option<OwnedFd>,
}

impl HelperProgram {
    pub(super) fn new(path: &Path) -> Self {
        let sealed = sys::seal_program(path);
        if let Err(error) = &sealed {
            tracing::warn!(%error, "the program cannot be shielded from containers: the kernel should be 5.12 or newer");
        }
        Self { path: path.to_owned(), sealed: sealed.ok() }
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = match &self.sealed {
            // The descriptor is closed by the very exec that it names.
            Some(view) => Command::new(format!("/proc/self/fd/{}", view.as_raw_fd())),
            None => Command::new(&self.path),
        };
        command.arg0("skep");
        command
    }
}
