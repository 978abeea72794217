//! User namespaces: the users of a container as users of the host that own nothing there.
//!
//! On disk, files keep the owners that containers see. What a shifted container's file system is mounted from are views of the
//! data directory whose owners the kernel shifts; so images, commits and volumes are the same with a map and without.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Group, Uid, User};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::engine::HelperProgram;
use crate::mounts::{is_mounted, unmount};
use crate::sys;

/// What of the data directory containers are made of. Of the rest, such as a node's keys, there is no view: to somebody who
/// came out of a container it would be theirs.
const SHOWN: [&str; 4] = ["bin", "containers", "image", "volumes"];

/// Whom `default` stands for, and what is set aside where nothing is.
const DEFAULT_USER: &str = "skepremap";
const USUAL_LEN: u32 = 65_536;
const FIRST_ID: u32 = 100_000;

/// So many ids of containers, from 0 on, are those of the host from `uid` and `gid` on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    pub uid: u32,
    pub gid: u32,
    pub len: u32,
}

/// Why ids cannot be mapped as asked.
#[derive(Debug, thiserror::Error)]
pub enum IdMapError {
    #[error("no user or group is called {0:?}: name one that there is, or \"default\"")]
    Unknown(String),
    #[error("{file} sets no ids aside for {name}: add the line {name}:{FIRST_ID}:{USUAL_LEN} to it")]
    NoRange { file: &'static str, name: String },
    #[error("{0} cannot be changed: add the line {DEFAULT_USER}:{FIRST_ID}:{USUAL_LEN} to it")]
    File(&'static str, #[source] io::Error),
}

const SUBUID: &str = "/etc/subuid";
const SUBGID: &str = "/etc/subgid";

impl IdMap {
    /// The map that `USER[:GROUP]`, by name or number, asks for; `default` has ids set aside if there are none.
    pub fn resolve(text: &str) -> Result<Self, IdMapError> {
        if text == "default" {
            for file in [SUBUID, SUBGID] {
                set_aside(file).map_err(|cause| IdMapError::File(file, cause))?;
            }
            return Self::of(&[DEFAULT_USER.to_owned()], &[DEFAULT_USER.to_owned()]);
        }
        let (user, group) = text.split_once(':').unwrap_or((text, ""));
        let found = match user.parse() {
            Ok(uid) => User::from_uid(Uid::from_raw(uid)),
            Err(_) => User::from_name(user),
        };
        let found = found.ok().flatten().ok_or_else(|| IdMapError::Unknown(user.to_owned()))?;
        let users = [found.name.clone(), found.uid.to_string()];
        if group.is_empty() {
            return Self::of(&users, &[found.name, found.gid.to_string()]);
        }
        let found = match group.parse() {
            Ok(gid) => Group::from_gid(Gid::from_raw(gid)),
            Err(_) => Group::from_name(group),
        };
        let found = found.ok().flatten().ok_or_else(|| IdMapError::Unknown(group.to_owned()))?;
        Self::of(&users, &[found.name, found.gid.to_string()])
    }

    fn of(users: &[String], groups: &[String]) -> Result<Self, IdMapError> {
        let first = |file: &'static str, names: &[String]| {
            let text = fs::read_to_string(file).unwrap_or_default();
            range_of(&text, names).ok_or_else(|| IdMapError::NoRange { file, name: names[0].clone() })
        };
        let (uids, gids) = (first(SUBUID, users)?, first(SUBGID, groups)?);
        Ok(Self { uid: uids.0, gid: gids.0, len: uids.1.min(gids.1) })
    }
}

/// The first range that is set aside for one of `names`: where it begins, and how long it is.
fn range_of(text: &str, names: &[String]) -> Option<(u32, u32)> {
    ranges(text)
        .find(|(name, _, len)| names.iter().any(|wanted| wanted == name) && *len > 0)
        .map(|(_, at, len)| (at, len))
}

fn ranges(text: &str) -> impl Iterator<Item = (&str, u32, u32)> {
    text.lines().filter_map(|line| {
        let mut parts = line.trim().split(':');
        Some((parts.next()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    })
}

/// Sets ids aside behind all that are, unless some are already.
fn set_aside(file: &str) -> io::Result<()> {
    let text = match fs::read_to_string(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read?,
    };
    if range_of(&text, &[DEFAULT_USER.to_owned()]).is_some() {
        return Ok(());
    }
    let end = ranges(&text).map(|(_, at, len)| at.saturating_add(len)).max().unwrap_or(0).max(FIRST_ID);
    if end.checked_add(USUAL_LEN).is_none() {
        return Err(io::Error::other("no ids are left"));
    }
    let gap = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let line = format!("{gap}{DEFAULT_USER}:{end}:{USUAL_LEN}\n");
    fs::OpenOptions::new().create(true).append(true).open(file)?.write_all(line.as_bytes())
}

/// A map in force: its user namespace, which its containers share, and its views of the data directory.
#[derive(Clone, Debug)]
pub(crate) struct Shift {
    map: IdMap,
    data_dir: PathBuf,
    /// Gone with the host's next start.
    dir: PathBuf,
}

impl Shift {
    pub(crate) fn new(map: IdMap, data_dir: &Path, run_dir: &Path) -> Self {
        let dir = run_dir.join("id-maps").join(format!("{}-{}-{}", map.uid, map.gid, map.len));
        Self { map, data_dir: data_dir.to_owned(), dir }
    }

    pub(crate) fn user_namespace(&self) -> PathBuf {
        self.dir.join("user")
    }

    fn data_view(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// What lies at `path`, as the map's containers may see it; the same path where it lies elsewhere.
    pub(crate) fn view(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.data_dir).map_or_else(|_| path.to_owned(), |rest| self.data_view().join(rest))
    }

    /// The map, as a runtime-spec's members `uidMappings` and `gidMappings`.
    pub(crate) fn mappings(&self) -> [Value; 2] {
        [self.map.uid, self.map.gid].map(|at| json!([{"containerID": 0, "hostID": at, "size": self.map.len}]))
    }

    /// A container's user and group as the host's.
    pub(crate) fn host_ids(&self, uid: u32, gid: u32) -> io::Result<(u32, u32)> {
        if uid.max(gid) >= self.map.len {
            return Err(io::Error::other(format!("{uid}:{gid} is beyond the {} ids that are mapped", self.map.len)));
        }
        Ok((self.map.uid + uid, self.map.gid + gid))
    }

    /// Puts the map in force, unless it is. One at a time.
    pub(crate) fn ensure(&self, helper: &HelperProgram) -> io::Result<()> {
        let user = self.user_namespace();
        let views = SHOWN.map(|name| (self.data_dir.join(name), self.data_view().join(name)));
        views.iter().try_for_each(|(_, view)| fs::create_dir_all(view))?;
        if !is_pin(&user) {
            pin_namespace(helper, Kind::User, &user, |pid| {
                fs::write(format!("/proc/{pid}/uid_map"), format!("0 {} {}", self.map.uid, self.map.len))?;
                fs::write(format!("/proc/{pid}/gid_map"), format!("0 {} {}", self.map.gid, self.map.len))
            })?;
            // A view by another namespace is another view.
            views.iter().try_for_each(|(_, view)| unmount(view))?;
        }
        let users = File::open(&user)?;
        for (dir, view) in views {
            if is_mounted(&view)? {
                continue;
            }
            sys::mount_shifted(&dir, &view, users.as_fd()).map_err(|error| {
                let what = "the owners of files cannot be mapped: that takes Linux 5.19 and a file system such as ext4, xfs \
                            or btrfs at";
                io::Error::new(error.kind(), format!("{what} {}: {error}", dir.display()))
            })?;
        }
        Ok(())
    }

    /// Does `work` so that what it makes in the view belongs to a container's root.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let working = scope.spawn(|| {
                sys::make_files_as(self.map.uid, self.map.gid)?;
                work()
            });
            working.join().map_err(|_| io::Error::other("it panicked"))?
        })
    }
}

fn is_pin(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}

/// What a helper can hold.
#[derive(Clone, Copy, Debug)]
enum Kind<'a> {
    User,
    /// Owned by a user namespace.
    Network(&'a Path),
}

/// Pins a new network namespace to `pin` that belongs to a user namespace.
pub(crate) fn pin_network(helper: &HelperProgram, user_namespace: &Path, pin: &Path) -> io::Result<()> {
    pin_namespace(helper, Kind::Network(user_namespace), pin, |_| Ok(()))
}

/// Has a helper make a namespace, since a program of several threads cannot, and pins that to `pin`.
fn pin_namespace(
    helper: &HelperProgram,
    kind: Kind<'_>,
    pin: &Path,
    set_up: impl FnOnce(u32) -> io::Result<()>,
) -> io::Result<()> {
    let mut command = helper.command();
    command.arg("hold-namespace");
    let name = match kind {
        Kind::User => "user",
        Kind::Network(owner) => {
            command.arg(owner);
            "net"
        }
    };
    let command = command.as_std_mut();
    let mut held =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).current_dir("/").spawn()?;
    let pinned = is_ready(&mut held).and_then(|()| {
        set_up(held.id())?;
        File::create(pin)?;
        let source = format!("/proc/{}/ns/{name}", held.id());
        mount(Some(source.as_str()), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(())
    });
    // It ends with its input.
    drop(held.stdin.take());
    held.wait()?;
    pinned
}

fn is_ready(held: &mut Child) -> io::Result<()> {
    let ready = held.stdout.as_mut().map_or(Ok(0), |stdout| stdout.read(&mut [0]))?;
    if ready == 1 {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(stderr) = &mut held.stderr {
        stderr.read_to_string(&mut said)?;
    }
    Err(io::Error::other(format!("a namespace could not be made: {}", said.trim())))
}

/// `skep hold-namespace [OWNER]`: makes a user namespace, or a network namespace that belongs to OWNER, and holds it
/// until its input ends.
pub fn hold_namespace_main(owner: Option<&Path>) -> i32 {
    let held = make_namespace(owner).and_then(|()| {
        io::stdout().write_all(b"\n")?;
        io::stdout().flush()?;
        io::copy(&mut io::stdin(), &mut io::sink())
    });
    match held {
        Ok(_) => 0,
        Err(error) => {
            eprintln!("{error}");
            1
        }
    }
}

fn make_namespace(owner: Option<&Path>) -> io::Result<()> {
    let Some(owner) = owner else { return Ok(unshare(CloneFlags::CLONE_NEWUSER)?) };
    enter_user_namespace(&File::open(owner)?)?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    // As in every other; not there where the kernel has none.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    Ok(())
}

/// Makes this process the root of a user namespace; it must have one thread.
pub(crate) fn enter_user_namespace(users: &File) -> io::Result<()> {
    setns(users.as_fd(), CloneFlags::CLONE_NEWUSER)?;
    nix::unistd::setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_by_name_or_number_and_nonsense_is_passed_over() {
        let text = "# ids\nme:100000:65536\nbroken\n1001:165536:0\n1001:231072:1000\n";
        let range = |name: &str| range_of(text, &[name.to_owned()]);
        assert_eq!(range("me"), Some((100_000, 65_536)));
        assert_eq!(range("1001"), Some((231_072, 1000)));
        assert_eq!(range("broken"), None);
    }

    #[test]
    fn ids_are_set_aside_once_and_behind_all_others() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("subuid");
        let file = file.to_str().unwrap();
        fs::write(file, "me:100000:65536\nyou:165536:65536").unwrap();
        set_aside(file).unwrap();
        set_aside(file).unwrap();
        let text = fs::read_to_string(file).unwrap();
        assert_eq!(text, "me:100000:65536\nyou:165536:65536\nskepremap:231072:65536\n");
    }

    #[test]
    fn what_lies_in_the_data_directory_is_seen_shifted() {
        let map = IdMap { uid: 100_000, gid: 200_000, len: 1000 };
        let shift = Shift::new(map, Path::new("/data"), Path::new("/run/x"));
        assert_eq!(
            shift.view(Path::new("/data/volumes/a")),
            Path::new("/run/x/id-maps/100000-200000-1000/data/volumes/a")
        );
        assert_eq!(shift.view(Path::new("/etc/hosts")), Path::new("/etc/hosts"));
        assert_eq!(shift.host_ids(5, 7).unwrap(), (100_005, 200_007));
        assert!(shift.host_ids(0, 1000).is_err());
    }
}
