//! What a container of a task is made from: the Engine API's `ContainerSpec`.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use skep_api_derive::Extensible;

use crate::id::{ConfigId, SecretId};
use crate::secret_bytes::SecretBytes;
use crate::units::{ByteSize, Nanos};

/// The container of a task. Field names in JSON are Docker's.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ContainerSpec {
    pub image: String,
    /// What the image's registry is asked with: the `X-Registry-Auth` of whoever declared the
    /// service. Handed to the workers that pull, and to nobody else.
    #[serde(skip)]
    pub registry_auth: SecretBytes,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub dir: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub privileges: Option<Privileges>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<bool>,
    #[serde(rename = "TTY", skip_serializing_if = "std::ops::Not::not")]
    pub tty: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub open_stdin: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
    /// Between the stop signal and SIGKILL; 10 s if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_grace_period: Option<Nanos>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<HealthConfig>,
    /// Lines `IP name [name…]` for /etc/hosts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    #[serde(rename = "DNSConfig", skip_serializing_if = "Option::is_none")]
    pub dns: Option<DnsConfig>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<SecretReference>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub configs: Vec<ConfigReference>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub isolation: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sysctls: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub capability_add: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub capability_drop: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ulimits: Vec<Ulimit>,
    #[serde(skip_serializing_if = "is_zero")]
    pub oom_score_adj: i64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(value: &i64) -> bool {
    *value == 0
}

/// Security switches of a service's container.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Privileges {
    /// The node's default if not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_new_privileges: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seccomp: Option<SeccompOptions>,
    #[serde(rename = "AppArmor", skip_serializing_if = "Option::is_none")]
    pub apparmor: Option<AppArmorOptions>,
    #[added]
    #[serde(rename = "SELinuxContext", skip_serializing_if = "Option::is_none")]
    pub selinux: Option<SelinuxContext>,
}

/// The label of a service's container for SELinux. Nodes without SELinux have no use for it, and those that have it give
/// none yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct SelinuxContext {
    pub disable: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub role: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub r#type: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub level: String,
}

impl SelinuxContext {
    /// Whether it asks for a label.
    #[must_use]
    pub fn names_any(&self) -> bool {
        [&self.user, &self.role, &self.r#type, &self.level].iter().any(|part| !part.is_empty())
    }
}

/// How the system calls of a service's container are filtered.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct SeccompOptions {
    pub mode: SeccompMode,
    /// Docker's JSON of a profile, in base 64; with [`SeccompMode::Custom`] alone.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub profile: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SeccompMode {
    #[default]
    #[serde(alias = "")]
    Default,
    Unconfined,
    Custom,
}

/// Whether AppArmor confines a service's container, on nodes that have it.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AppArmorOptions {
    pub mode: AppArmorMode,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AppArmorMode {
    #[default]
    #[serde(alias = "")]
    Default,
    Disabled,
}

impl SeccompOptions {
    /// The profile's JSON, if it has one of its own.
    pub fn custom(&self) -> Result<Option<serde_json::Value>, String> {
        match (self.mode, self.profile.as_str()) {
            (SeccompMode::Default | SeccompMode::Unconfined, "") => Ok(None),
            (SeccompMode::Default | SeccompMode::Unconfined, _) => {
                Err("a seccomp profile is given: it needs mode custom".into())
            }
            (SeccompMode::Custom, "") => Err("seccomp mode custom needs a profile".into()),
            (SeccompMode::Custom, text) => {
                let json = BASE64_STANDARD.decode(text).map_err(|error| format!("the seccomp profile: {error}"))?;
                serde_json::from_slice(&json).map(Some).map_err(|error| format!("the seccomp profile: {error}"))
            }
        }
    }
}

/// A file system shown inside the container.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Mount {
    #[serde(rename = "Type")]
    pub kind: MountKind,
    /// A host path for a bind, a volume's name for a volume (none: an anonymous one), an image's for an image, a name or
    /// `group:GROUP` for a volume of the swarm.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source: String,
    pub target: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub consistency: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bind_options: Option<BindOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_options: Option<VolumeOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tmpfs_options: Option<TmpfsOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_options: Option<ImageOptions>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    Bind,
    #[default]
    Volume,
    Tmpfs,
    /// The files of an image; in single containers alone.
    Image,
    /// A volume of the swarm, by its name or by its group; in services alone.
    Cluster,
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageOptions {
    /// What of it is shown; empty: all.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub subpath: String,
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct BindOptions {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub propagation: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub non_recursive: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub create_mountpoint: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct VolumeOptions {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_copy: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub subpath: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver_config: Option<Driver>,
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TmpfsOptions {
    #[serde(skip_serializing_if = "ByteSize::is_zero")]
    pub size_bytes: ByteSize,
    /// Permission bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

/// A named driver with its options: of logs, of volumes, of payload templates.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Driver {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
}

impl Driver {
    /// A driver without options.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), options: BTreeMap::new() }
    }
}

/// How a container's health is asked for. Zero stands for the default, as in the Engine API.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HealthConfig {
    /// Empty: as the image says; `NONE`; `CMD …`; `CMD-SHELL …`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub test: Vec<String>,
    #[serde(skip_serializing_if = "Nanos::is_zero")]
    pub interval: Nanos,
    #[serde(skip_serializing_if = "Nanos::is_zero")]
    pub timeout: Nanos,
    #[serde(skip_serializing_if = "is_zero")]
    pub retries: i64,
    #[serde(skip_serializing_if = "Nanos::is_zero")]
    pub start_period: Nanos,
    #[serde(skip_serializing_if = "Nanos::is_zero")]
    pub start_interval: Nanos,
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DnsConfig {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Ulimit {
    pub name: String,
    pub hard: i64,
    pub soft: i64,
}

/// Where a payload appears inside the container.
#[derive(Clone, Debug, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct FileTarget {
    /// An absolute path, or a name below `/run/secrets` (secrets) or `/` (configs).
    pub name: String,
    /// A number.
    #[serde(rename = "UID")]
    pub uid: String,
    #[serde(rename = "GID")]
    pub gid: String,
    /// Permission bits.
    pub mode: u32,
}

impl Default for FileTarget {
    fn default() -> Self {
        Self { name: String::new(), uid: "0".to_owned(), gid: "0".to_owned(), mode: 0o444 }
    }
}

#[derive(Clone, Debug, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SecretReference {
    #[serde(default)]
    pub file: FileTarget,
    #[serde(rename = "SecretID")]
    pub secret_id: SecretId,
    #[serde(default)]
    pub secret_name: String,
}

#[derive(Clone, Debug, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ConfigReference {
    #[serde(default)]
    pub file: FileTarget,
    #[serde(rename = "ConfigID")]
    pub config_id: ConfigId,
    #[serde(default)]
    pub config_name: String,
}
