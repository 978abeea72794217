//! A container's file system: a root of the image's layers, the files it is given, payloads
//! on tmpfs. All of it can be taken down twice and half-made.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MsFlags, mount};

use crate::container::config::{ContainerConfig, FileMount, NetworkMode, Payload};
use crate::container::id_map::Shift;
use crate::container::storage::Storage;
use crate::mounts::{is_mounted, unmount};

/// All payloads of one container fit: configs alone may have near 1 MB each.
const PAYLOADS_LEN: &str = "size=64m,mode=0711";

/// The directories of one container.
#[derive(Clone, Debug)]
pub(crate) struct ContainerDirs {
    /// Kept as long as the container: configuration, log, the writable layer.
    pub(crate) data: PathBuf,
    /// Gone with the host's next start: mounts, sockets.
    pub(crate) run: PathBuf,
    /// How owners of files are shown; none: as they are on disk.
    pub(crate) shift: Option<Shift>,
    pub(crate) storage: Arc<dyn Storage>,
}

impl ContainerDirs {
    pub(crate) fn rootfs(&self) -> PathBuf {
        self.view(&self.plain_rootfs())
    }

    /// The root with owners as they are on disk; no place to mount anything at.
    pub(crate) fn plain_rootfs(&self) -> PathBuf {
        self.data.join("rootfs")
    }

    pub(crate) fn make_rootfs(&self) -> io::Result<()> {
        fs::create_dir_all(self.plain_rootfs())
    }

    /// What overlayfs needs for itself.
    pub(crate) fn work(&self) -> PathBuf {
        self.data.join("work")
    }

    /// What a root of copies was when it was made.
    pub(crate) fn made(&self) -> PathBuf {
        self.data.join("made")
    }

    /// Where the container sees what lies at `path`.
    pub(crate) fn view(&self, path: &Path) -> PathBuf {
        self.shift.as_ref().map_or_else(|| path.to_owned(), |shift| shift.view(path))
    }

    /// Shows a directory with its owners as they are where the container's users can come to it.
    pub(crate) fn show(&self, name: &str, dir: &Path) -> io::Result<PathBuf> {
        if self.shift.is_none() {
            return Ok(dir.to_owned());
        }
        let shown = self.shown().join(name);
        fs::create_dir_all(&shown)?;
        if !is_mounted(&shown)? {
            mount(Some(dir), &shown, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        }
        Ok(shown)
    }

    fn shown(&self) -> PathBuf {
        self.run.join("shown")
    }

    /// Does `work` so that what it makes where the container sees it belongs to the container's root.
    pub(crate) fn as_root<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        match &self.shift {
            Some(shift) => shift.run(work),
            None => work(),
        }
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.data.join("diff")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.data.join("output.log")
    }

    /// Where the watcher leaves the exit code: the second, if there is no room for the first.
    pub(crate) fn exits(&self) -> [PathBuf; 2] {
        [self.data.join("exit.json"), self.run.join("exit.json")]
    }

    fn payloads(&self) -> PathBuf {
        self.run.join("payloads")
    }

    /// Makes the root of `layers`, the lowest first.
    pub(crate) fn mount_root(&self, layers: &[PathBuf]) -> io::Result<()> {
        self.storage.raise(self, layers)
    }

    /// Where what was changed in the root lies, as overlayfs has it; not there if nothing ever was.
    pub(crate) fn changed(&self) -> io::Result<PathBuf> {
        self.storage.note_changes(self)?;
        Ok(self.upper())
    }

    /// Writes /etc/hosts, with the container's own addresses, /etc/hostname and /etc/resolv.conf; returns how they are shown.
    pub(crate) fn write_etc(&self, config: &ContainerConfig, addresses: &[IpAddr]) -> io::Result<Vec<FileMount>> {
        let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
        for line in &config.hosts {
            hosts += &format!("{line}\n");
        }
        let names = match config.domainname.as_str() {
            "" => config.hostname.clone(),
            domain => format!("{0}.{domain} {0}", config.hostname),
        };
        for address in addresses {
            hosts += &format!("{address}\t{names}\n");
        }
        let files =
            [("hosts", hosts), ("hostname", format!("{}\n", config.hostname)), ("resolv.conf", resolv_conf(config))];
        let mut mounts = Vec::new();
        for (name, text) in files {
            let source = self.data.join(name);
            fs::write(&source, text)?;
            fs::set_permissions(&source, fs::Permissions::from_mode(0o644))?;
            mounts.push(FileMount {
                source: self.view(&source),
                target: format!("/etc/{name}"),
                read_only: config.read_only,
            });
        }
        Ok(mounts)
    }

    /// Puts payloads on a tmpfs of their own; returns how they are shown.
    pub(crate) fn write_payloads(&self, payloads: &[Payload]) -> io::Result<Vec<FileMount>> {
        if payloads.is_empty() {
            return Ok(Vec::new());
        }
        let dir = self.payloads();
        fs::create_dir_all(&dir)?;
        if !is_mount_point(&dir)? {
            let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
            mount(Some("tmpfs"), &dir, Some("tmpfs"), flags, Some(PAYLOADS_LEN))?;
        }
        let mut mounts = Vec::new();
        for (number, payload) in payloads.iter().enumerate() {
            let source = dir.join(number.to_string());
            fs::write(&source, payload.bytes.expose())?;
            let (uid, gid) = match &self.shift {
                Some(shift) => shift.host_ids(payload.uid, payload.gid)?,
                None => (payload.uid, payload.gid),
            };
            chown(&source, Some(uid), Some(gid))?;
            fs::set_permissions(&source, fs::Permissions::from_mode(payload.mode & 0o7777))?;
            mounts.push(FileMount { source, target: payload.target.clone(), read_only: true });
        }
        Ok(mounts)
    }

    /// Takes every mount down; goes on after an error and returns the first.
    pub(crate) fn unmount(&self) -> io::Result<()> {
        let shown = fs::read_dir(self.shown()).into_iter().flatten().flatten().map(|entry| entry.path());
        let others = shown.chain([self.payloads()]).map(|path| unmount(&path));
        others.fold(self.storage.lower(self), io::Result::and)
    }

    /// Unmounts and removes all there is.
    pub(crate) fn remove(&self) -> io::Result<()> {
        self.unmount()?;
        for dir in [&self.run, &self.data] {
            match fs::remove_dir_all(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

pub(crate) fn is_mount_point(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let parent = path.parent().unwrap_or(path);
    Ok(fs::metadata(path)?.dev() != fs::metadata(parent)?.dev())
}

/// Where names of networks are served, inside each container that joins some.
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

fn resolv_conf(config: &ContainerConfig) -> String {
    let mut text = String::new();
    let host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let mut options = config.dns_options.clone();
    if config.network.serves_names() {
        // It asks the servers named by the configuration, or the host's, for what it does not know.
        text += &format!("nameserver {NAME_SERVER}\n");
        if !options.iter().any(|option| option.starts_with("ndots:")) {
            options.push("ndots:0".into());
        }
    } else if matches!(config.network, NetworkMode::Host | NetworkMode::Container(_)) && config.dns.is_empty() {
        text += &host;
    } else if config.dns.is_empty() {
        // The host's loopback is not the container's.
        let servers = host.lines().filter(|line| line.starts_with("nameserver") && !line.contains(" 127."));
        servers.for_each(|line| text += &format!("{line}\n"));
    }
    if !config.network.serves_names() {
        config.dns.iter().for_each(|server| text += &format!("nameserver {server}\n"));
    }
    if !config.dns_search.is_empty() {
        text += &format!("search {}\n", config.dns_search.join(" "));
    }
    if !options.is_empty() {
        text += &format!("options {}\n", options.join(" "));
    }
    text
}
