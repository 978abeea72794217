//! What a container is made from, checked and complete.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skep_api::container::Ulimit;
use skep_api::service::Protocol;

use crate::container::id_map::IdMap;
use crate::container::logs::config::LogConfig;
use crate::container::runtime::ExternalRuntime;
use crate::container::storage::StorageDriver;
use crate::network::{DEFAULT_NETWORK, WantedPlace};

/// A container's configuration, with the image's own already merged in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerConfig {
    pub name: String,
    /// The image as the user named it.
    pub image: String,
    /// The image's id, `sha256:…`; empty until it is resolved.
    pub image_id: String,
    pub entrypoint: Vec<String>,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: String,
    /// `user[:group]`, names or numbers.
    pub user: String,
    pub groups: Vec<String>,
    pub hostname: String,
    pub labels: BTreeMap<String, String>,
    pub mounts: Vec<ContainerMount>,
    /// Payloads to show as files, on tmpfs.
    #[serde(skip)]
    pub payloads: Vec<Payload>,
    /// Whether an init runs first; None: as the daemon has it.
    pub init: Option<bool>,
    pub read_only: bool,
    /// Whether programs may gain privileges from set-user-id bits; the engine's default if not said.
    pub no_new_privileges: Option<bool>,
    /// Whether its users are the host's own, whatever the engine does by default.
    pub host_users: bool,
    /// How its users become users of the host; none: they are the host's.
    pub id_map: Option<IdMap>,
    /// What its root is made by.
    pub storage: StorageDriver,
    /// Whether the default system-call filter is on.
    pub seccomp: bool,
    pub cap_add: Vec<String>,
    pub cap_drop: Vec<String>,
    pub sysctls: BTreeMap<String, String>,
    pub ulimits: Vec<Ulimit>,
    pub oom_score_adj: i64,
    pub limits: ResourceLimits,
    pub stop_signal: String,
    pub health: Option<HealthCheck>,
    /// Lines `IP name…` for /etc/hosts.
    pub hosts: Vec<String>,
    /// Those that it finds by names of its own in the default network.
    pub links: Vec<Link>,
    pub dns: Vec<String>,
    pub dns_search: Vec<String>,
    pub dns_options: Vec<String>,
    pub network: NetworkMode,
    pub ports: Vec<PublishedPort>,
    /// Whether it is removed when it has ended.
    pub auto_remove: bool,
    pub log: LogConfig,
    /// None: the built-in one.
    pub runtime: Option<ExternalRuntime>,
    /// Whether its standard streams are a terminal.
    pub tty: bool,
    /// Whether it can be given input.
    pub open_stdin: bool,
    /// Whether its input ends with that of the first who is attached.
    pub stdin_once: bool,
    pub restart: RestartPolicy,
    /// All capabilities and devices, and nothing masked or filtered.
    pub privileged: bool,
    pub devices: Vec<Device>,
    /// By the names that vendors gave them (CDI).
    #[serde(default)]
    pub cdi_devices: Vec<String>,
    /// Rules such as `c 10:200 rwm`.
    pub device_rules: Vec<String>,
    /// Of /dev/shm; zero: 64 MB.
    pub shm_size_bytes: i64,
    pub pid_mode: NamespaceMode,
    pub ipc_mode: NamespaceMode,
    /// Of an IPC namespace of its own.
    pub shared_memory: SharedMemory,
    pub uts_mode: NamespaceMode,
    pub cgroup_mode: NamespaceMode,
    pub domainname: String,
    /// What the runtime is told beside.
    pub annotations: BTreeMap<String, String>,
    /// Absent: the usual ones.
    pub masked_paths: Option<Vec<String>>,
    pub read_only_paths: Option<Vec<String>>,
    /// A system-call filter of its own, as the runtime-spec's `seccomp`; null: the default one.
    pub seccomp_profile: serde_json::Value,
    /// The AppArmor profile that it asks for, or `unconfined`; empty: the engine's own.
    pub apparmor: String,
    /// Ports that the image or the user says are served; what `--publish-all` publishes.
    pub exposed_ports: Vec<String>,
    /// Below which cgroup it has its own; empty: the engine's.
    pub cgroup_parent: String,
    /// Between the stop signal and SIGKILL, where the one who stops it does not say.
    pub stop_timeout: Option<Duration>,
    /// What it was asked for with, for whoever inspects it; null if a service made it.
    pub request: serde_json::Value,
}

/// Whose namespace a container is in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NamespaceMode {
    #[default]
    Private,
    Host,
    /// Another container's, by its id; that one must run.
    Container(String),
}

/// What is at /dev/shm of a container that has an IPC namespace of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SharedMemory {
    /// Memory for itself alone.
    #[default]
    Private,
    /// Memory that other containers may share with the namespace.
    Shareable,
    None,
}

/// What a container calls another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The other one's id.
    pub container: String,
    pub alias: String,
}

/// A device of the host's that a container may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub host_path: String,
    pub path: String,
    /// Of `r`, `w` and `m`.
    pub access: String,
}

/// Whether a container that has ended is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartPolicy {
    #[default]
    No,
    Always,
    /// Always, but not by a daemon's start once it was stopped by hand.
    UnlessStopped,
    OnFailure {
        /// Zero: as often as it takes.
        retries_max: u32,
    },
}

impl RestartPolicy {
    /// The Engine API's word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Always => "always",
            Self::UnlessStopped => "unless-stopped",
            Self::OnFailure { .. } => "on-failure",
        }
    }

    #[must_use]
    pub const fn retries_max(self) -> u32 {
        match self {
            Self::OnFailure { retries_max } => retries_max,
            Self::No | Self::Always | Self::UnlessStopped => 0,
        }
    }
}

/// What a container sees of networks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum NetworkMode {
    /// A place on the host's bridge.
    #[default]
    Bridge,
    /// All that the host sees.
    Host,
    /// Nothing but its loopback.
    None,
    /// All that another container sees, by its id; that one must run.
    Container(String),
    /// Places in the host's networks; none at all is its loopback alone.
    Local(Vec<WantedPlace>),
    /// Places in networks that are not this host's alone.
    Joined(Vec<JoinedNetwork>),
}

impl NetworkMode {
    /// The Engine API's word.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Bridge => "bridge".into(),
            Self::Host => "host".into(),
            Self::None => "none".into(),
            Self::Container(id) => format!("container:{id}"),
            Self::Local(places) => places.first().map_or_else(|| "none".into(), |place| place.network.clone()),
            Self::Joined(_) => "default".into(),
        }
    }

    /// Whether names are served inside.
    pub(crate) fn serves_names(&self) -> bool {
        match self {
            Self::Bridge | Self::Host | Self::None | Self::Container(_) => false,
            Self::Local(places) => places.iter().any(|place| place.network != DEFAULT_NETWORK),
            Self::Joined(_) => true,
        }
    }
}

/// A place in a network that somebody else keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JoinedNetwork {
    /// Its keeper's name for it.
    pub id: String,
    pub address: Ipv4Addr,
}

/// Paths that tell of the host, or lead into it.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// Paths by which the host is changed.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Each CPU's throttling counters leak what others do.
fn thermal_throttle_paths() -> impl Iterator<Item = String> {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (0..cpus).map(|cpu| format!("/sys/devices/system/cpu/cpu{cpu}/thermal_throttle"))
}

/// What is told beside each line of output: the labels and variables that a log driver's options name, by themselves
/// or by regular expressions.
#[must_use]
pub fn log_attributes(
    options: &BTreeMap<String, String>,
    all_labels: &BTreeMap<String, String>,
    env: &[String],
) -> BTreeMap<String, String> {
    let names = |option: &str| options.get(option).map_or("", String::as_str).split(',');
    let variable = |name: &str| env.iter().find_map(|var| var.strip_prefix(name)?.strip_prefix('='));
    let labels = names("labels").filter_map(|name| Some((name, all_labels.get(name)?.as_str())));
    let variables = names("env").filter_map(|name| Some((name, variable(name)?)));
    let pattern = |option: &str| regex::Regex::new(options.get(option).filter(|text| !text.is_empty())?).ok();
    let (labels_like, env_like) = (pattern("labels-regex"), pattern("env-regex"));
    let matches = |pattern: &Option<regex::Regex>, name: &str| pattern.as_ref().is_some_and(|it| it.is_match(name));
    let more_labels = all_labels.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let more_labels = more_labels.filter(|(name, _)| matches(&labels_like, name));
    let more_variables = env.iter().filter_map(|var| var.split_once('='));
    let more_variables = more_variables.filter(|(name, _)| matches(&env_like, name));
    let told = labels.chain(variables).chain(more_labels).chain(more_variables);
    told.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// Of /dev/shm, unless said otherwise.
const SHM_SIZE_BYTES: i64 = 64 << 20;

impl ContainerConfig {
    /// What is hidden from it; none if it is privileged.
    #[must_use]
    pub fn masked_paths(&self) -> Option<Vec<String>> {
        let usual = || MASKED.iter().map(|&path| path.to_owned()).chain(thermal_throttle_paths()).collect();
        (!self.privileged).then(|| self.masked_paths.clone().unwrap_or_else(usual))
    }

    /// What it cannot change; none if it is privileged.
    #[must_use]
    pub fn read_only_paths(&self) -> Option<Vec<String>> {
        let usual = || READ_ONLY.iter().map(|&path| path.to_owned()).collect();
        (!self.privileged).then(|| self.read_only_paths.clone().unwrap_or_else(usual))
    }

    /// How large /dev/shm is.
    #[must_use]
    pub fn shm_size_bytes(&self) -> i64 {
        if self.shm_size_bytes > 0 { self.shm_size_bytes } else { SHM_SIZE_BYTES }
    }

    /// The labels and variables that the log's options `labels` and `env` ask to be told with each line.
    #[must_use]
    pub fn log_attributes(&self) -> BTreeMap<String, String> {
        log_attributes(&self.log.options, &self.labels, &self.env)
    }

    /// The command line: entrypoint, then arguments.
    #[must_use]
    pub fn command(&self) -> Vec<String> {
        self.entrypoint.iter().chain(&self.args).cloned().collect()
    }

    pub(crate) fn has_no_new_privileges(&self) -> bool {
        self.no_new_privileges == Some(true) && !self.privileged
    }

    /// The rows and columns that its terminal has at first, if its client said.
    pub(crate) fn terminal_size(&self) -> Option<[u16; 2]> {
        let size = self.request.pointer("/HostConfig/ConsoleSize").filter(|_| self.tty)?;
        serde_json::from_value(size.clone()).ok().filter(|size| *size != [0, 0])
    }

    /// Whether the default system-call filter is on.
    pub(crate) fn has_filter(&self) -> bool {
        self.seccomp && !self.privileged && self.seccomp_profile.is_null()
    }

    /// Whether the system-call filter comes compiled: where putting it on needs no privilege.
    pub(crate) fn has_compiled_filter(&self) -> bool {
        self.has_filter() && self.runtime.is_none() && (self.has_no_new_privileges() || self.id_map.is_some())
    }

    /// Whether the last steps to its program are left to this program.
    pub(crate) fn has_descent(&self) -> bool {
        self.id_map.is_some() && self.runtime.is_none()
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerMount {
    pub source: MountSource,
    pub target: String,
    pub read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum MountSource {
    Bind {
        path: String,
        propagation: String,
        /// Without what is mounted below it.
        #[serde(default)]
        alone: bool,
        /// Whether that can be written though the mount itself cannot.
        #[serde(default)]
        writable_below: bool,
    },
    /// An empty name stands for an anonymous volume until the container is created.
    Volume {
        name: String,
        labels: BTreeMap<String, String>,
        /// The local driver's, if the volume is made for this container.
        #[serde(default)]
        options: BTreeMap<String, String>,
        no_copy: bool,
        /// What of it is shown; empty: all.
        #[serde(default)]
        subpath: String,
    },
    Tmpfs {
        size_bytes: Option<i64>,
        mode: Option<u32>,
        /// More of mount(8)'s, such as `exec`; they win.
        #[serde(default)]
        options: Vec<String>,
    },
    /// The files of an image, with a layer of the container's own to be written.
    Image {
        /// As it was named.
        image: String,
        /// These two are found when the container is created.
        image_id: String,
        layers: Vec<String>,
        /// What of it is shown; empty: all.
        subpath: String,
    },
}

impl ContainerConfig {
    /// Whether it stands on an image, or shows its files.
    pub(crate) fn uses_image(&self, id: &str) -> bool {
        let shows =
            |mount: &ContainerMount| matches!(&mount.source, MountSource::Image { image_id, .. } if image_id == id);
        self.image_id == id || self.mounts.iter().any(shows)
    }
}

/// A secret or config as a file.
#[derive(Clone, PartialEq)]
pub struct Payload {
    /// An absolute path inside the container.
    pub target: String,
    pub bytes: skep_api::SecretBytes,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
}

impl std::fmt::Debug for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Payload").field("target", &self.target).finish_non_exhaustive()
    }
}

/// A host file bound into the container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct FileMount {
    pub(crate) source: PathBuf,
    pub(crate) target: String,
    pub(crate) read_only: bool,
}

/// Zero: no limit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResourceLimits {
    pub nano_cpus: i64,
    pub cpu_shares: u64,
    pub memory_bytes: i64,
    pub memory_reservation_bytes: i64,
    /// Memory and swap together; -1: as much swap as there is.
    pub memory_swap_bytes: i64,
    pub memory_swappiness: Option<u64>,
    pub oom_kill_disable: bool,
    pub pids: i64,
    pub cpu_period_micros: u64,
    pub cpu_quota_micros: i64,
    pub cpuset_cpus: String,
    pub cpuset_mems: String,
    /// 10–1000.
    pub blkio_weight: u16,
    /// For single block devices.
    pub block: Vec<BlockLimit>,
}

/// How much is to be had of one block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockLimit {
    pub kind: BlockLimitKind,
    pub major: u64,
    pub minor: u64,
    /// The weight, bytes a second, or operations a second.
    pub amount: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockLimitKind {
    Weight,
    ReadBytes,
    WriteBytes,
    ReadOperations,
    WriteOperations,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// The command line to run.
    pub command: Vec<String>,
    pub interval: Duration,
    pub timeout: Duration,
    pub retries: u32,
    pub start_period: Duration,
    pub start_interval: Duration,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PublishedPort {
    pub protocol: Protocol,
    pub container_port: u16,
    /// The host's address it is served at, an unspecified one for all of its family; none: all of them.
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
    /// Zero: one that is free is taken at start.
    pub host_port: u16,
    /// The last of several from `host_port` on, any of which will do; zero: that one is meant.
    #[serde(default)]
    pub host_port_last: u16,
}

impl PublishedPort {
    /// Whether it is left open which of the host's ports it is.
    pub(crate) fn is_open(&self) -> bool {
        self.host_port == 0 || self.host_port_last > self.host_port
    }

    /// Whether it is served at addresses of a family.
    pub(crate) fn has_family(&self, v6: bool) -> bool {
        self.host_ip.is_none_or(|address| address.is_ipv6() == v6)
    }

    /// The one address that it is served at, if it is one.
    pub(crate) fn one_address(&self) -> Option<IpAddr> {
        self.host_ip.filter(|address| !address.is_unspecified())
    }
}
