//! Who a container runs as: names are looked up in the image's own files, without leaving its root.

use std::io::Read as _;
use std::path::Path;

use crate::sys;

/// Files larger than this are not read: an image may hold anything.
const FILE_LEN_MAX: u64 = 1 << 20;

/// The kernel keeps the last of all for "nobody in particular"; Docker takes half of them.
const ID_MAX: u32 = i32::MAX.cast_unsigned();

/// A user in numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ResolvedUser {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// Why a user cannot be resolved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    #[error("unable to find user {0}: no matching entries in passwd file: name one of the image's, or a number")]
    UnknownUser(String),
    #[error("unable to find group {0}: no matching entries in group file: name one of the image's, or a number")]
    UnknownGroup(String),
    #[error("uids and gids must be in range 0-2147483647, which {0} is not")]
    OutOfRange(String),
}

/// Resolves `user[:group]` and more groups within `rootfs`.
pub(crate) fn resolve(rootfs: &Path, spec: &str, more: &[String]) -> Result<ResolvedUser, UserError> {
    resolve_in(&read_bounded(rootfs, "etc/passwd"), &read_bounded(rootfs, "etc/group"), spec, more)
}

fn read_bounded(rootfs: &Path, path: &str) -> String {
    let Ok(file) = sys::open_in_root(rootfs, Path::new(path)) else { return String::new() };
    let mut text = String::new();
    match file.take(FILE_LEN_MAX).read_to_string(&mut text) {
        Ok(_) => text,
        Err(_) => String::new(),
    }
}

fn resolve_in(passwd: &str, group: &str, spec: &str, more: &[String]) -> Result<ResolvedUser, UserError> {
    let (user, wanted_group) = spec.split_once(':').map_or((spec, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    let row = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() >= 6 && (fields[0] == user || user.parse::<u32>().is_ok_and(|uid| fields[2] == uid.to_string()))
    });
    let number = |text: &str| text.parse::<u32>().ok().filter(|&id| id <= ID_MAX);
    let absent = |text: &str, unknown: fn(String) -> UserError| {
        let error = if text.parse::<i64>().is_ok() { UserError::OutOfRange } else { unknown };
        error(text.to_owned())
    };
    let (uid, own_gid, name, home) = match &row {
        Some(fields) => (number(fields[2]), number(fields[3]), fields[0], fields[5]),
        None => (number(user), Some(0), "", "/"),
    };
    let uid = uid.ok_or_else(|| absent(user, UserError::UnknownUser))?;
    let gid_of = |wanted: &str| {
        let named =
            group.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|f| f.len() >= 3 && f[0] == wanted);
        named.and_then(|fields| number(fields[2])).or_else(|| number(wanted))
    };
    let group_number = |wanted: &str| gid_of(wanted).ok_or_else(|| absent(wanted, UserError::UnknownGroup));
    let gid = match wanted_group.filter(|group| !group.is_empty()) {
        Some(wanted) => group_number(wanted)?,
        None => own_gid.unwrap_or(0),
    };
    // Its own group is one of them, so that a program cannot give it up by taking another.
    let mut groups = vec![gid];
    if wanted_group.is_none() && !name.is_empty() {
        let member_of = group.lines().filter_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let member = fields.len() >= 4 && fields[3].split(',').any(|member| member == name);
            member.then(|| number(fields[2])).flatten()
        });
        groups.extend(member_of);
    }
    for wanted in more {
        groups.push(group_number(wanted)?);
    }
    groups.sort_unstable();
    groups.dedup();
    Ok(ResolvedUser { uid, gid, groups, home: if home.is_empty() { "/".into() } else { home.to_owned() } })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001::/home/web:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nweb:x:1001:\ntape:x:26:web\n";

    #[track_caller]
    fn check(spec: &str, want: Result<(u32, u32, &[u32], &str), UserError>) {
        let want =
            want.map(|(uid, gid, groups, home)| ResolvedUser { uid, gid, groups: groups.into(), home: home.into() });
        assert_eq!(resolve_in(PASSWD, GROUP, spec, &[]), want, "{spec:?}");
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        check("", Ok((0, 0, &[0], "/root")));
        check("web", Ok((1000, 1001, &[26, 1001], "/home/web")));
        check("1000", Ok((1000, 1001, &[26, 1001], "/home/web")));
        check("web:tape", Ok((1000, 26, &[26], "/home/web")));
        check("4711", Ok((4711, 0, &[0], "/")));
        check("0123", Ok((123, 0, &[0], "/")));
        check("4294967295", Err(UserError::OutOfRange("4294967295".into())));
        check("-1", Err(UserError::OutOfRange("-1".into())));
        check("0:2147483648", Err(UserError::OutOfRange("2147483648".into())));
        check("nobody", Err(UserError::UnknownUser("nobody".into())));
        check("web:none", Err(UserError::UnknownGroup("none".into())));
    }
}
