//! Network namespaces, pinned to a path so that they outlive the process that made them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    path: PathBuf,
}

impl Netns {
    /// Makes a new namespace and pins it to `path`.
    pub async fn create(path: &Path) -> io::Result<Self> {
        let pinned = path.to_owned();
        on_own_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            // No network has IPv6 yet; links have addresses of it unless told otherwise. Not there where
            // the kernel has none.
            let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            File::create(&pinned)?;
            mount(Some("/proc/thread-self/ns/net"), &pinned, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        })
        .await?;
        Self::open(path)
    }

    /// Opens the namespace that is pinned to `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let kind = nix::sys::statfs::fstatfs(&file)?.filesystem_type();
        if kind != nix::sys::statfs::NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("{} pins no namespace", path.display())));
        }
        Ok(Self { file: Arc::new(file), path: path.to_owned() })
    }

    /// Opens the namespace at `path`, or makes it; says whether it is new.
    pub async fn ensure(path: &Path) -> io::Result<(Self, bool)> {
        match Self::open(path) {
            Ok(netns) => Ok((netns, false)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((Self::create(path).await?, true)),
            Err(error) => Err(error),
        }
    }

    /// Lets go of the namespace at `path`; it is gone with its last user. Doing so twice is harmless.
    pub fn remove(path: &Path) -> io::Result<()> {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the calling thread into the namespace.
    pub fn enter(&self) -> io::Result<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)?;
        Ok(())
    }

    /// Does `work` inside the namespace.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let netns = self.clone();
        on_own_thread(move || {
            netns.enter()?;
            work()
        })
        .await
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Netns {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Runs what changes the thread's namespace on a thread that ends with it.
pub async fn on_own_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("netns".into()).spawn(move || drop(done.send(work())))?;
    result.await.map_err(io::Error::other)?
}
