//! A container's file system: a root of the image's layers, the files it is given, payloads
//! on tmpfs. All of it can be taken down twice and half-made.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MsFlags, mount};

use crate::container::config::{ContainerConfig, FileMount, NetworkMode, Payload};
use crate::container::id_map::Shift;
use crate::container::logs::config::FileFormat;
use crate::container::storage::Storage;
use crate::mounts::{is_mounted, unmount};

/// The files of /etc that say what a container knows of its network.
/// Where images that are mounted have their layers.
const MOUNTS: &str = "mounts";
const REMOVE_TRIES: u32 = 5;
const ETC_FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// Stands for the host in lines for /etc/hosts.
pub const HOST_GATEWAY: &str = "host-gateway";

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

    /// Shows what was opened, whatever takes its place meanwhile.
    pub(crate) fn show_opened(&self, name: &str, opened: &fs::File) -> io::Result<PathBuf> {
        let shown = self.shown().join(name);
        if opened.metadata()?.is_dir() {
            fs::create_dir_all(&shown)?;
        } else {
            fs::create_dir_all(self.shown())?;
            fs::write(&shown, "")?;
        }
        let opened = format!("/proc/self/fd/{}", opened.as_raw_fd());
        mount(Some(opened.as_str()), &shown, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
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

    /// The directories of an image that is mounted, by which of the mounts it is.
    pub(crate) fn of_mount(&self, number: usize) -> Self {
        let within = |dir: &Path| dir.join(MOUNTS).join(number.to_string());
        Self {
            data: within(&self.data),
            run: within(&self.run),
            shift: self.shift.clone(),
            storage: self.storage.clone(),
        }
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.data.join("diff")
    }

    /// Where output is kept: lines of JSON under the name that other programs look for.
    pub(crate) fn log(&self, format: FileFormat) -> PathBuf {
        let plain = self.data.join("output.log");
        match (format, self.data.file_name()) {
            // Containers of older daemons go on with what they have.
            (FileFormat::Json, Some(id)) if !plain.exists() => {
                self.data.join(format!("{}-json.log", id.to_string_lossy()))
            }
            (FileFormat::Json | FileFormat::Binary, _) => plain,
        }
    }

    /// Where the watcher leaves the exit code: the second, if there is no room for the first.
    pub(crate) fn exits(&self) -> [PathBuf; 2] {
        [self.data.join("exit.json"), self.run.join("exit.json")]
    }

    fn payloads(&self) -> PathBuf {
        self.run.join("payloads")
    }

    /// The memory that other containers may share.
    pub(crate) fn shared_memory(&self) -> PathBuf {
        self.run.join("shm")
    }

    pub(crate) fn make_shared_memory(&self, size_bytes: i64) -> io::Result<PathBuf> {
        let dir = self.shared_memory();
        let options = format!("mode=1777,size={size_bytes}");
        mount_memory(&dir, &options)?;
        Ok(dir)
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

    /// Writes /etc/hosts, with the container's own addresses and the host's as it is reached from there, /etc/hostname
    /// and /etc/resolv.conf; returns how they are shown.
    pub(crate) fn write_etc(
        &self,
        config: &ContainerConfig,
        addresses: &[IpAddr],
        host: &[IpAddr],
    ) -> io::Result<Vec<FileMount>> {
        let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
        for line in &config.hosts {
            let lines = match line.strip_prefix(HOST_GATEWAY) {
                Some(names) => host.iter().map(|host| format!("{host}{names}")).collect(),
                None => vec![line.clone()],
            };
            for line in lines {
                // As docker writes it, and scripts read it.
                let line = if line.contains('\t') { line } else { line.replacen(' ', "\t", 1) };
                hosts += &format!("{line}\n");
            }
        }
        let whole = match config.domainname.as_str() {
            "" => config.hostname.clone(),
            domain => format!("{}.{domain}", config.hostname),
        };
        let names = match whole.split_once('.') {
            Some((first, _)) => format!("{whole} {first}"),
            None => whole,
        };
        for address in addresses {
            hosts += &format!("{address}\t{names}\n");
        }
        let files = ETC_FILES.into_iter().zip([hosts, format!("{}\n", config.hostname), resolv_conf(config)]);
        for (name, text) in files {
            let source = self.data.join(name);
            fs::write(&source, text)?;
            fs::set_permissions(&source, fs::Permissions::from_mode(0o644))?;
        }
        Ok(self.shown_etc(config.read_only))
    }

    /// How those files are shown.
    pub(crate) fn shown_etc(&self, read_only: bool) -> Vec<FileMount> {
        let shown = |name: &str| FileMount {
            source: self.view(&self.data.join(name)),
            target: format!("/etc/{name}"),
            read_only,
        };
        ETC_FILES.map(shown).into()
    }

    /// Puts payloads on a tmpfs of their own; returns how they are shown.
    pub(crate) fn write_payloads(&self, payloads: &[Payload]) -> io::Result<Vec<FileMount>> {
        if payloads.is_empty() {
            return Ok(Vec::new());
        }
        let dir = self.payloads();
        mount_memory(&dir, PAYLOADS_LEN)?;
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
        let others = shown.chain([self.payloads(), self.shared_memory()]).map(|path| unmount(&path));
        let mounts = fs::read_dir(self.data.join(MOUNTS)).into_iter().flatten().flatten();
        let mounts =
            mounts.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(|number| self.of_mount(number));
        others.chain(mounts.map(|dirs| dirs.unmount())).fold(self.storage.lower(self), io::Result::and)
    }

    /// Unmounts and removes all there is.
    pub(crate) fn remove(&self) -> io::Result<()> {
        self.unmount()?;
        [&self.run, &self.data].into_iter().try_for_each(|dir| remove_all(dir))
    }
}

/// Removes a directory that somebody may write into once more, such as the last words of whoever watched.
fn remove_all(dir: &Path) -> io::Result<()> {
    let mut tries_left = REMOVE_TRIES;
    loop {
        tries_left -= 1;
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries_left > 0 => {}
            removed => return removed,
        }
    }
}

/// Mounts a tmpfs at `dir`, which is made, unless one is there.
fn mount_memory(dir: &Path, options: &str) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    if !is_mount_point(dir)? {
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some(options))?;
    }
    Ok(())
}

pub(crate) fn is_mount_point(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let parent = path.parent().unwrap_or(path);
    Ok(fs::metadata(path)?.dev() != fs::metadata(parent)?.dev())
}

/// Where names of networks are served, inside each container that joins some.
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// Where a host that asks a server of its own says whom that one asks.
const SYSTEMD_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
/// Whom containers ask on a host that only asks itself. As Docker has them.
const FALLBACK_SERVERS: [&str; 2] = ["8.8.8.8", "8.8.4.4"];

/// The lines of the host's file that begin with a word, without it.
fn said<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
    text.lines().filter_map(|line| line.trim().strip_prefix(word)?.strip_prefix([' ', '\t'])).map(str::trim).collect()
}

/// The host's servers that a container can ask: the host's loopback is not the container's.
fn outer_servers(host: &str) -> Vec<String> {
    let outer = |text: &str| {
        let all = said(text, "nameserver").into_iter();
        let own = |server: &&str| server.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        all.filter(|server| !own(server)).map(str::to_owned).collect::<Vec<_>>()
    };
    let mut servers = outer(host);
    if servers.is_empty() {
        servers = outer(&fs::read_to_string(SYSTEMD_RESOLVED).unwrap_or_default());
    }
    if servers.is_empty() { FALLBACK_SERVERS.map(str::to_owned).into() } else { servers }
}

fn resolv_conf(config: &ContainerConfig) -> String {
    let host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    resolv_conf_like(config, &host)
}

/// As the host's file, but for what the configuration says.
fn resolv_conf_like(config: &ContainerConfig, host: &str) -> String {
    let on_host = matches!(config.network, NetworkMode::Host | NetworkMode::Container(_));
    if on_host && config.dns.is_empty() && config.dns_search.is_empty() && config.dns_options.is_empty() {
        return host.to_owned();
    }
    let words = |own: &[String], line: &str| {
        let host = || said(host, line).last().map(|text| text.split_whitespace().map(str::to_owned).collect());
        if own.is_empty() { host().unwrap_or_default() } else { own.to_vec() }
    };
    let (mut search, mut options): (Vec<String>, Vec<String>) =
        (words(&config.dns_search, "search"), words(&config.dns_options, "options"));
    // How a user says that there is none.
    search.retain(|domain| domain != ".");
    let servers = if config.network.serves_names() {
        // It asks the servers named by the configuration, or the host's, for what it does not know.
        if !options.iter().any(|option| option.starts_with("ndots:")) {
            options.push("ndots:0".into());
        }
        vec![NAME_SERVER.to_string()]
    } else if !config.dns.is_empty() {
        config.dns.clone()
    } else if on_host {
        said(host, "nameserver").into_iter().map(str::to_owned).collect()
    } else {
        outer_servers(host)
    };
    let mut text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    if !search.is_empty() {
        text += &format!("search {}\n", search.join(" "));
    }
    if !options.is_empty() {
        text += &format!("options {}\n", options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(host: &str, change: impl FnOnce(&mut ContainerConfig), want: &str) {
        let mut config = ContainerConfig::default();
        change(&mut config);
        assert_eq!(resolv_conf_like(&config, host), want);
    }

    #[test]
    fn resolvers_are_the_hosts_but_for_what_is_said() {
        let host =
            "# whoever\nnameserver 127.0.0.53\nnameserver 10.0.0.1\nsearch a.example b.example\noptions timeout:1\n";
        let all = "nameserver 10.0.0.1\nsearch a.example b.example\noptions timeout:1\n";
        check(host, |_| {}, all);
        check(host, |config| config.network = NetworkMode::Host, host);
        let own = |config: &mut ContainerConfig| {
            config.dns = vec!["10.9.9.9".into()];
            config.dns_search = vec![".".into()];
            config.dns_options = vec!["rotate".into()];
        };
        check(host, own, "nameserver 10.9.9.9\noptions rotate\n");
        let named = |config: &mut ContainerConfig| config.network = NetworkMode::Joined(Vec::new());
        check("nameserver ::1\n", named, "nameserver 127.0.0.11\noptions ndots:0\n");
        check("search x\n", |config| config.dns = vec!["10.1.1.1".into()], "nameserver 10.1.1.1\nsearch x\n");
    }
}
