//! Devices by name: what vendors say of them in files, by the Container Device Interface (up to version 1.1).
//!
//! A name such as `vendor.com/class=name` stands for changes to a container: nodes in its /dev, files that it sees,
//! variables, groups, hooks. Of directories a later one counts more; within one, nothing may be said twice.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::container::devices;

/// The largest file that is read, in bytes: that of a host with many graphics cards is some 100 KB.
const FILE_LEN_MAX: u64 = 4 << 20;

/// Why a container cannot have the devices that it names.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    #[error("CDI device injection failed: unresolvable CDI devices {names}: {known}")]
    Unknown { names: String, known: String },
    #[error("CDI device injection failed: {name} is said by {first} and {second}: remove one of them", first = .files.0.display(), second = .files.1.display())]
    Twice { name: String, files: (PathBuf, PathBuf) },
    #[error("CDI device injection failed: {name} asks for {what}, which are not supported")]
    Unsupported { name: String, what: &'static str },
    #[error("CDI device injection failed: the device {path} of {name} is not there")]
    NoNode {
        name: String,
        path: String,
        #[source]
        cause: io::Error,
    },
}

#[derive(Debug, Deserialize)]
struct File {
    kind: String,
    #[serde(default)]
    devices: Vec<Device>,
    #[serde(default, rename = "containerEdits")]
    edits: Edits,
}

#[derive(Clone, Debug, Deserialize)]
struct Device {
    name: String,
    #[serde(default, rename = "containerEdits")]
    edits: Edits,
}

/// What is changed in a container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Edits {
    env: Vec<String>,
    device_nodes: Vec<DeviceNode>,
    mounts: Vec<Mount>,
    hooks: Vec<Hook>,
    #[serde(rename = "additionalGids")]
    additional_groups: Vec<u32>,
    net_devices: Vec<Value>,
    intel_rdt: Value,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DeviceNode {
    path: String,
    host_path: String,
    permissions: String,
    file_mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Mount {
    host_path: String,
    container_path: String,
    options: Vec<String>,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Hook {
    hook_name: String,
    path: String,
    args: Vec<String>,
    env: Vec<String>,
    timeout: Option<i64>,
}

/// Whether a text has the shape of a device's name: `vendor.com/class=name`.
#[must_use]
pub fn is_cdi_name(text: &str) -> bool {
    let word = |text: &str, others: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || others.contains(c);
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.ends_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(fits)
    };
    text.split_once('=').is_some_and(|(kind, name)| {
        let kind = kind.split_once('/');
        kind.is_some_and(|(vendor, class)| word(vendor, "_-.") && word(class, "_-.")) && word(name, "_-.:")
    })
}

/// All devices that files in `dirs` name, in order.
#[must_use]
pub fn cdi_devices(dirs: &[PathBuf]) -> Vec<String> {
    Registry::read(dirs).devices.into_keys().collect()
}

/// Makes a container's spec what its devices ask for.
pub(crate) fn apply(names: &[String], dirs: &[PathBuf], spec: &mut Value) -> Result<(), CdiError> {
    if names.is_empty() {
        return Ok(());
    }
    let registry = Registry::read(dirs);
    let unknown: Vec<_> = names.iter().filter(|name| !registry.devices.contains_key(*name)).cloned().collect();
    if !unknown.is_empty() {
        return Err(CdiError::Unknown { names: unknown.join(", "), known: registry.tell(dirs) });
    }
    let mut files = BTreeSet::new();
    for name in names {
        let Found { device, file, .. } = &registry.devices[name];
        if let Some(other) = registry.conflicts.get(name) {
            return Err(CdiError::Twice { name: name.clone(), files: (file.clone(), other.clone()) });
        }
        // What is said of all devices of a file is done once.
        if files.insert(file) {
            registry.files[file].apply(name, spec)?;
        }
        device.edits.apply(name, spec)?;
    }
    Ok(())
}

/// What is said, and where.
#[derive(Default)]
struct Registry {
    devices: BTreeMap<String, Found>,
    /// What holds for all devices of a file.
    files: BTreeMap<PathBuf, Edits>,
    /// Names that are said once more in the same directory, and where.
    conflicts: BTreeMap<String, PathBuf>,
    broken: Vec<String>,
}

struct Found {
    device: Device,
    file: PathBuf,
    /// The place of the file's directory among all.
    dir: usize,
}

impl Registry {
    fn read(dirs: &[PathBuf]) -> Self {
        let mut registry = Self::default();
        for (index, dir) in dirs.iter().enumerate() {
            // A directory that is not there says nothing.
            let mut paths: Vec<_> =
                fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            paths.sort();
            for path in paths {
                match read_file(&path) {
                    None => {}
                    Some(Ok(file)) => registry.add(index, path, file),
                    Some(Err(why)) => registry.broken.push(format!("{} cannot be read: {why}", path.display())),
                }
            }
        }
        registry
    }

    fn add(&mut self, dir: usize, path: PathBuf, file: File) {
        for device in file.devices {
            let name = format!("{}={}", file.kind, device.name);
            match self.devices.get(&name) {
                Some(before) if before.dir == dir => {
                    self.conflicts.insert(name, path.clone());
                    continue;
                }
                _ => self.conflicts.remove(&name),
            };
            self.devices.insert(name, Found { device, file: path.clone(), dir });
        }
        self.files.insert(path, file.edits);
    }

    /// What there is, for whoever asked for something else.
    fn tell(&self, dirs: &[PathBuf]) -> String {
        let dirs = dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(" and ");
        let known = self.devices.keys().cloned().collect::<Vec<_>>().join(", ");
        let known = match (dirs.is_empty(), known.is_empty()) {
            (true, _) => "there are none, for the daemon looks nowhere (cdi-spec-dirs)".to_owned(),
            (false, true) => format!("files in {dirs} name no device"),
            (false, false) => format!("files in {dirs} name {known}"),
        };
        [vec![known], self.broken.clone()].concat().join("; ")
    }
}

/// Reads a file, if it is one of these by its name.
fn read_file(path: &Path) -> Option<Result<File, String>> {
    let extension = path.extension()?.to_str()?;
    if !matches!(extension, "json" | "yaml" | "yml") {
        return None;
    }
    let read = || {
        let len = fs::metadata(path).map_err(|error| error.to_string())?.len();
        if len > FILE_LEN_MAX {
            return Err(format!("it has {len} bytes, at most {FILE_LEN_MAX} are read"));
        }
        let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
        match extension {
            "json" => serde_json::from_str(&text).map_err(|error| error.to_string()),
            _ => serde_saphyr::from_str(&text).map_err(|error| error.to_string()),
        }
    };
    Some(read())
}

impl Edits {
    fn apply(&self, name: &str, spec: &mut Value) -> Result<(), CdiError> {
        let unsupported = [
            (!self.net_devices.is_empty(), "network devices (netDevices)"),
            (!self.intel_rdt.is_null(), "shares of caches and memory bandwidth (intelRdt)"),
        ];
        if let Some((_, what)) = unsupported.into_iter().find(|(asked, _)| *asked) {
            return Err(CdiError::Unsupported { name: name.to_owned(), what });
        }
        let env = list(&mut spec["process"]["env"]);
        for variable in &self.env {
            let own = variable.split('=').next();
            env.retain(|other| other.as_str().and_then(|other| other.split('=').next()) != own);
            env.push(json!(variable));
        }
        for node in &self.device_nodes {
            node.apply(name, spec)?;
        }
        list(&mut spec["mounts"]).extend(self.mounts.iter().map(Mount::to_spec));
        for hook in &self.hooks {
            list(&mut spec["hooks"][&hook.hook_name]).push(hook.to_spec());
        }
        let groups = list(&mut spec["process"]["user"]["additionalGids"]);
        for group in self.additional_groups.iter().filter(|&&group| group != 0) {
            if !groups.contains(&json!(group)) {
                groups.push(json!(group));
            }
        }
        Ok(())
    }
}

impl DeviceNode {
    fn apply(&self, name: &str, spec: &mut Value) -> Result<(), CdiError> {
        let from = if self.host_path.is_empty() { &self.path } else { &self.host_path };
        let node = devices::node_at(from, &self.path).map_err(|cause| CdiError::NoNode {
            name: name.to_owned(),
            path: from.clone(),
            cause,
        })?;
        let access = if self.permissions.is_empty() { "rwm" } else { &self.permissions };
        let rule = json!({"allow": true, "type": node["type"], "major": node["major"], "minor": node["minor"], "access": access});
        let mut node = node;
        for (key, said) in [("fileMode", self.file_mode), ("uid", self.uid), ("gid", self.gid)] {
            if let Some(said) = said {
                node[key] = json!(said);
            }
        }
        let nodes = list(&mut spec["linux"]["devices"]);
        nodes.retain(|other| other["path"] != node["path"]);
        nodes.push(node);
        list(&mut spec["linux"]["resources"]["devices"]).push(rule);
        Ok(())
    }
}

impl Mount {
    fn to_spec(&self) -> Value {
        let mut options = self.options.clone();
        let kind = if self.kind.is_empty() { "bind" } else { &self.kind };
        if kind == "bind" && !options.iter().any(|option| matches!(option.as_str(), "bind" | "rbind")) {
            options.push("bind".into());
        }
        json!({"source": self.host_path, "destination": self.container_path, "type": kind, "options": options})
    }
}

impl Hook {
    fn to_spec(&self) -> Value {
        json!({"path": self.path, "args": self.args, "env": self.env, "timeout": self.timeout})
    }
}

/// A list, an empty one if there is none.
fn list(value: &mut Value) -> &mut Vec<Value> {
    if !value.is_array() {
        *value = json!([]);
    }
    value.as_array_mut().expect("it was just made one")
}

#[cfg(test)]
mod tests {
    use super::*;

    const VENDOR: &str = r"
cdiVersion: 0.6.0
kind: vendor.com/device
containerEdits:
  env: [ALL=1]
devices:
- name: one
  containerEdits:
    env:
    - ONE=1
    - PATH=/own
    deviceNodes:
    - path: /dev/vendor1
      hostPath: /dev/null
      permissions: r
    mounts:
    - {hostPath: /usr/lib/a, containerPath: /lib/a, options: [ro, nosuid]}
    hooks:
    - {hookName: createContainer, path: /usr/bin/hook, args: [hook, go]}
    additionalGids: [44]
- name: two
  containerEdits:
    deviceNodes:
    - path: /dev/not/there
- name: link
  containerEdits:
    netDevices:
    - {hostInterfaceName: eth9, name: eth0}
";

    fn dirs() -> (tempfile::TempDir, Vec<PathBuf>) {
        let root = tempfile::tempdir().unwrap();
        let dirs = ["etc", "run"].map(|name| root.path().join(name));
        dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
        fs::write(dirs[0].join("vendor.yaml"), VENDOR).unwrap();
        fs::write(dirs[0].join("broken.json"), "{").unwrap();
        fs::write(dirs[0].join("README"), "{").unwrap();
        (root, dirs.to_vec())
    }

    fn applied(names: &[&str], dirs: &[PathBuf]) -> Result<Value, String> {
        let mut spec = json!({"process": {"env": ["PATH=/bin"], "user": {}}, "linux": {}});
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        apply(&names, dirs, &mut spec).map(|()| spec).map_err(|error| skep_api::with_causes(&error))
    }

    #[test]
    fn a_device_changes_what_it_says_and_its_file_s_share_once() {
        let (_root, dirs) = dirs();
        let spec = applied(&["vendor.com/device=one", "vendor.com/device=one"], &dirs).unwrap();
        assert_eq!(spec["process"]["env"], json!(["ALL=1", "ONE=1", "PATH=/own"]));
        assert_eq!(spec["process"]["user"]["additionalGids"], json!([44]));
        let node = &spec["linux"]["devices"][0];
        assert_eq!((node["path"].as_str(), node["major"].as_u64()), (Some("/dev/vendor1"), Some(1)));
        assert_eq!(spec["linux"]["resources"]["devices"][0]["access"], "r");
        assert_eq!(spec["mounts"][0]["options"], json!(["ro", "nosuid", "bind"]));
        assert_eq!(spec["hooks"]["createContainer"][0]["args"], json!(["hook", "go"]));
    }

    #[test]
    fn what_cannot_be_had_is_named_with_what_can() {
        let (_root, dirs) = dirs();
        let told = applied(&["vendor.com/device=three"], &dirs).unwrap_err();
        assert!(told.contains("unresolvable CDI devices vendor.com/device=three"), "{told}");
        assert!(
            told.contains("vendor.com/device=link, vendor.com/device=one, ") && told.contains("broken.json"),
            "{told}"
        );
        assert!(
            applied(&["vendor.com/device=two"], &dirs).unwrap_err().contains("/dev/not/there of vendor.com/device=two")
        );
        assert!(
            applied(&["vendor.com/device=link"], &dirs).unwrap_err().contains("netDevices), which are not supported")
        );
        assert!(applied(&["vendor.com/device=one"], &[]).unwrap_err().contains("looks nowhere"));
    }

    #[test]
    fn a_later_directory_counts_more_and_nothing_counts_twice() {
        let (_root, dirs) = dirs();
        let other = r#"{"cdiVersion": "0.6.0", "kind": "vendor.com/device",
            "devices": [{"name": "one", "containerEdits": {"env": ["ONE=other"]}}]}"#;
        fs::write(dirs[1].join("other.json"), other).unwrap();
        let spec = applied(&["vendor.com/device=one"], &dirs).unwrap();
        assert_eq!(spec["process"]["env"], json!(["PATH=/bin", "ONE=other"]));
        fs::write(dirs[1].join("same.json"), other).unwrap();
        let told = applied(&["vendor.com/device=one"], &dirs).unwrap_err();
        assert!(told.contains("other.json") && told.contains("same.json"), "{told}");
    }

    #[test]
    fn names_are_told_from_paths() {
        for name in ["vendor.com/class=name", "nvidia.com/gpu=0:1", "v/c=all"] {
            assert!(is_cdi_name(name), "{name}");
        }
        for other in ["/dev/null", "/dev/a=b", "vendor.com=x", "vendor.com/class=", "vendor.com/class", "a/b/c=d"] {
            assert!(!is_cdi_name(other), "{other}");
        }
    }
}
