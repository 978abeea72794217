//! The devices a container has, and those it may use.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use crate::container::config::ContainerConfig;

/// What it may use: nothing but the harmless ones and those asked for; any may be made (mknod), which
/// opens nothing.
pub(crate) fn rules(config: &ContainerConfig) -> Value {
    if config.privileged {
        return json!([{"allow": true, "access": "rwm"}]);
    }
    let mut rules = vec![json!({"allow": false, "access": "rwm"})];
    for kind in ["c", "b"] {
        rules.push(json!({"allow": true, "type": kind, "access": "m"}));
    }
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
        rules.push(json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"}));
    }
    rules.push(json!({"allow": true, "type": "c", "major": 136, "access": "rwm"}));
    for device in &config.devices {
        for node in found(&device.host_path, &device.path) {
            rules.push(json!({
                "allow": true, "type": node.kind, "major": node.major, "minor": node.minor, "access": device.access,
            }));
        }
    }
    rules.extend(config.device_rules.iter().filter_map(|text| rule(text)));
    json!(rules)
}

/// The devices that are made in its /dev beside the usual ones.
pub(crate) fn nodes(config: &ContainerConfig) -> Value {
    let nodes = if config.privileged {
        found("/dev", "/dev").into_iter().filter(|node| !is_usual(&node.path)).collect()
    } else {
        config.devices.iter().flat_map(|device| found(&device.host_path, &device.path)).collect::<Vec<_>>()
    };
    Value::Array(nodes.iter().map(Node::to_spec).collect())
}

/// The host's device at `host_path`, to be made at `path`, as the runtime-spec has it.
pub(crate) fn node_at(host_path: &str, path: &str) -> io::Result<Value> {
    match found(host_path, path).as_slice() {
        [node] if fs::metadata(host_path)?.file_type().is_dir() || node.path != path => Err(not_one()),
        [node] => Ok(node.to_spec()),
        _ => {
            fs::metadata(host_path)?;
            Err(not_one())
        }
    }
}

fn not_one() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "it is no device")
}

/// Whether the text is a rule: `c 10:200 rwm`, `b *:* r`.
pub fn is_device_rule(text: &str) -> bool {
    rule(text).is_some()
}

/// Whether there is a device at a path, or in the directory there.
#[must_use]
pub fn holds_device(path: &str) -> bool {
    !found(path, path).is_empty()
}

/// The numbers of one of the host's block devices.
pub fn block_device(path: &str) -> io::Result<(u64, u64)> {
    let meta = fs::metadata(path)?;
    if meta.file_type().is_block_device() {
        Ok((major(meta.rdev()), minor(meta.rdev())))
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no block device"))
    }
}

fn rule(text: &str) -> Option<Value> {
    let parts: Vec<&str> = text.split(' ').collect();
    let &[kind, numbers, access] = parts.as_slice() else { return None };
    let known = matches!(kind, "a" | "b" | "c") && !access.is_empty() && access.chars().all(|c| "rwm".contains(c));
    let (major, minor) = numbers.split_once(':').filter(|_| known)?;
    let mut value = json!({"allow": true, "type": kind, "access": access});
    for (key, number) in [("major", major), ("minor", minor)] {
        if number != "*" {
            value[key] = json!(number.parse::<i64>().ok()?);
        }
    }
    Some(value)
}

struct Node {
    path: String,
    kind: &'static str,
    major: u64,
    minor: u64,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Node {
    fn to_spec(&self) -> Value {
        json!({"path": self.path, "type": self.kind, "major": self.major, "minor": self.minor,
            "fileMode": self.mode & 0o777, "uid": self.uid, "gid": self.gid})
    }
}

/// The device at `host_path`, or those below it, as they are to be seen at `path`.
fn found(host_path: &str, path: &str) -> Vec<Node> {
    let Ok(meta) = fs::metadata(host_path) else { return Vec::new() };
    let kind = meta.file_type();
    if kind.is_char_device() || kind.is_block_device() {
        return vec![Node {
            path: path.to_owned(),
            kind: if kind.is_block_device() { "b" } else { "c" },
            major: major(meta.rdev()),
            minor: minor(meta.rdev()),
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
        }];
    }
    let entries = fs::read_dir(host_path).into_iter().flatten().flatten();
    // A link to a directory may lead in circles.
    let entries = entries.filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_symlink()));
    let below = entries.flat_map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        found(&Path::new(host_path).join(&name).to_string_lossy(), &Path::new(path).join(&name).to_string_lossy())
    });
    below.collect()
}

/// What the runtime makes, or what belongs to a mount of the container's own.
fn is_usual(path: &str) -> bool {
    const USUAL: [&str; 8] = ["null", "zero", "full", "random", "urandom", "tty", "console", "ptmx"];
    let rest = path.trim_start_matches("/dev/");
    USUAL.contains(&rest) || ["pts/", "shm/", "mqueue/", ".lxc", ".udev"].iter().any(|below| rest.starts_with(below))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::config::Device;

    #[test]
    fn only_what_was_asked_for_is_allowed() {
        let device = Device { host_path: "/dev/null".into(), path: "/dev/nothing".into(), access: "r".into() };
        let config = ContainerConfig {
            devices: vec![device],
            device_rules: vec!["c 10:200 rw".into()],
            ..ContainerConfig::default()
        };
        assert_eq!(nodes(&config)[0]["path"], "/dev/nothing");
        let rules = rules(&config).to_string();
        assert!(rules.contains(r#""access":"rw","major":10,"minor":200"#), "{rules}");
        assert!(nodes(&ContainerConfig::default()).as_array().unwrap().is_empty());
        assert!(!is_device_rule("x 1:2 r") && !is_device_rule("c 1 r") && is_device_rule("b *:* m"));
    }
}
