//! What the daemon can be told: by flags, and by a JSON file of the same names.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Flags of `skep daemon`. Names are dockerd's where both have the thing.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct DaemonArgs {
    /// Socket to serve the API on: unix://PATH or tcp://HOST:PORT (repeatable)
    #[arg(short = 'H', long = "host", value_name = "SOCKET")]
    pub hosts: Vec<String>,
    /// Directory of what lasts [default: /var/lib/skep]
    #[arg(long, value_name = "DIR")]
    pub data_root: Option<PathBuf>,
    /// Directory of what does not outlive a start of the host [default: /run/skep]
    #[arg(long, value_name = "DIR")]
    pub exec_root: Option<PathBuf>,
    /// File for the daemon's process id
    #[arg(short = 'p', long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// JSON file with these settings [default: /etc/skep/daemon.json, if there]
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,
    /// Check the configuration and end
    #[arg(long)]
    pub validate: bool,
    /// debug, info, warn, error or fatal [default: info]
    #[arg(short = 'l', long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// How the log is written: text, or json, an object on each line [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// As --log-level debug
    #[arg(short = 'D', long)]
    pub debug: bool,
    /// Group that may use the Unix sockets [default: skep or docker, if there]
    #[arg(short = 'G', long, value_name = "GROUP")]
    pub group: Option<String>,
    /// Mirror of Docker Hub to ask first (repeatable)
    #[arg(long = "registry-mirror", value_name = "URL")]
    pub registry_mirrors: Vec<String>,
    /// Registry that may be spoken to without TLS (repeatable)
    #[arg(long = "insecure-registry", value_name = "HOST:PORT")]
    pub insecure_registries: Vec<String>,
    /// Proxy for what registries are asked over http
    #[arg(long, value_name = "URL")]
    pub http_proxy: Option<String>,
    /// The same over https
    #[arg(long, value_name = "URL")]
    pub https_proxy: Option<String>,
    /// Hosts that are asked without a proxy, with commas between
    #[arg(long, value_name = "HOSTS")]
    pub no_proxy: Option<String>,
    /// Layers of an image that come at the same time [default: 3]
    #[arg(long, value_name = "N")]
    pub max_concurrent_downloads: Option<usize>,
    /// Layers of an image that go at the same time [default: 5]
    #[arg(long, value_name = "N")]
    pub max_concurrent_uploads: Option<usize>,
    /// Pool that this host's networks get subnets of: base=172.30.0.0/16,size=24 (repeatable); the default one gets the
    /// first
    #[arg(long = "default-address-pool", value_name = "POOL")]
    pub default_address_pools: Vec<String>,
    /// Address and subnet of the default bridge: 192.168.5.1/24
    #[arg(long, value_name = "CIDR")]
    pub bip: Option<String>,
    /// The part of that subnet that containers get addresses of
    #[arg(long, value_name = "CIDR")]
    pub fixed_cidr: Option<String>,
    /// Give the default bridge IPv6 addresses, too
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub ipv6: Option<bool>,
    /// Of this subnet; picked by chance if absent
    #[arg(long, value_name = "CIDR")]
    pub fixed_cidr_v6: Option<String>,
    /// How many bytes a packet of the default bridge may have [default: 1500]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// The host's address that ports are published on unless another is named [default: all]
    #[arg(long, value_name = "ADDRESS")]
    pub ip: Option<String>,
    /// Listen at published ports for clients whom no rule leads to their containers [default: true]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub userland_proxy: Option<bool>,
    /// Option of networks that do not say: DRIVER=NAME=VALUE (repeatable)
    #[arg(long = "default-network-opt", value_name = "OPTION")]
    pub default_network_opts: Vec<String>,
    /// What host-gateway stands for, one address of IPv4 and one of IPv6 (repeatable) [default: the network's gateway]
    #[arg(long = "host-gateway-ip", value_name = "ADDRESS")]
    pub host_gateway_ips: Vec<String>,
    /// Resolver of containers that do not say (repeatable)
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<String>,
    #[arg(long = "dns-opt", visible_alias = "dns-option", value_name = "OPTION")]
    pub dns_opts: Vec<String>,
    #[arg(long, value_name = "DOMAIN")]
    pub dns_search: Vec<String>,
    /// Of containers that do not say: NAME=SOFT[:HARD] (repeatable)
    #[arg(long = "default-ulimit", value_name = "ULIMIT")]
    pub default_ulimits: Vec<String>,
    /// Size of /dev/shm of containers that do not say [default: 64m]
    #[arg(long, value_name = "SIZE")]
    pub default_shm_size: Option<String>,
    /// private or shareable [default: private]
    #[arg(long, value_name = "MODE")]
    pub default_ipc_mode: Option<String>,
    /// private or host [default: private]
    #[arg(long, value_name = "MODE")]
    pub default_cgroupns_mode: Option<String>,
    /// Have containers that do not say run an init first
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub init: Option<bool>,
    /// That init, which takes tini's arguments [default: our own]
    #[arg(long, value_name = "FILE")]
    pub init_path: Option<PathBuf>,
    /// Directory with files that name devices, by the Container Device Interface (repeatable); an empty one: there are none
    /// [default: /etc/cdi, /var/run/cdi]
    #[arg(long = "cdi-spec-dir", value_name = "DIR")]
    pub cdi_spec_dirs: Vec<String>,
    /// System-call filter of containers that do not say [default: our own]
    #[arg(long, value_name = "FILE")]
    pub seccomp_profile: Option<PathBuf>,
    /// What other nodes reach this one at, unless it is said when a swarm is made or joined
    #[arg(long, value_name = "ADDRESS")]
    pub swarm_default_advertise_addr: Option<String>,
    /// Label of this node's engine: KEY=VALUE (repeatable)
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<String>,
    /// What this node has that tasks can reserve: KIND=NAME for one of its own, KIND=NUMBER for so many (repeatable)
    #[arg(long = "node-generic-resource", value_name = "KIND=VALUE")]
    pub node_generic_resources: Vec<String>,
    /// What makes containers' roots of layers: overlay2, btrfs or vfs [default: overlay2, vfs where that cannot be]
    #[arg(short = 's', long, value_name = "DRIVER")]
    pub storage_driver: Option<String>,
    /// Keep containers while the daemon is down (always so: accepted for dockerd's sake)
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub live_restore: Option<bool>,
    /// Cgroup below which containers have theirs [default: /skep]
    #[arg(long, value_name = "PATH")]
    pub cgroup_parent: Option<String>,
    /// Whether containers that do not say gain nothing from set-user-id programs [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub no_new_privileges: Option<bool>,
    /// Have containers' users be users of the host that own nothing: "default", or whose ids they take: USER[:GROUP]
    #[arg(long, value_name = "USER[:GROUP]")]
    pub userns_remap: Option<String>,
    /// OCI runtime beside the built-in one: NAME=PATH (repeatable)
    #[arg(long = "add-runtime", value_name = "NAME=PATH")]
    pub add_runtimes: Vec<String>,
    /// Runtime of containers that do not say [default: skep, the built-in one]
    #[arg(long, value_name = "NAME")]
    pub default_runtime: Option<String>,
    /// Whether containers on the default bridge reach each other [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub icc: Option<bool>,
    /// Log driver of containers that do not say: json-file, local, syslog, journald, gelf, fluentd or none [default: json-file]
    #[arg(long, value_name = "DRIVER")]
    pub log_driver: Option<String>,
    /// Option of that log driver: NAME=VALUE (repeatable)
    #[arg(long = "log-opt", value_name = "NAME=VALUE")]
    pub log_opts: Vec<String>,
    /// Address to serve Prometheus metrics on: HOST:PORT
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics_addr: Option<String>,
    /// How long the key of the tunnels to other nodes lasts, such as 12h; 0s: for ever [default: 12h]
    #[arg(long, value_name = "DURATION")]
    pub overlay_key_period: Option<String>,
    /// How often a leading manager says so, and what managers must answer within: several times as long as a packet takes
    /// between any two of them and back; the same on all [default: 50ms]
    #[arg(long, value_name = "DURATION")]
    pub raft_heartbeat: Option<String>,
    /// What carries packets between containers of two nodes: auto (the kernel's WireGuard where both have it), userspace
    /// (this program, always) or kernel (as auto, and the daemon does not start without it) [default: auto]
    #[arg(long, value_name = "WAY")]
    pub data_path: Option<String>,
    /// Ask API clients on TCP for a certificate of this CA
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub tlsverify: Option<bool>,
    #[arg(long, value_name = "FILE")]
    pub tlscacert: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    pub tlscert: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    pub tlskey: Option<PathBuf>,
    #[command(flatten)]
    pub fixed: FixedArgs,
}

/// Settings of dockerd's that have one value here; see [`fixed`](super::fixed).
#[derive(Clone, Debug, Default, clap::Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FixedArgs {
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<bool>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iptables: Option<bool>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip6tables: Option<bool>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_forward: Option<bool>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_forward_no_drop: Option<bool>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_masq: Option<bool>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experimental: Option<bool>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raw_logs: Option<bool>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selinux_enabled: Option<bool>,
    #[arg(short = 'b', long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub containerd: Option<String>,
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_gateway: Option<String>,
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_gateway_v6: Option<String>,
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firewall_backend: Option<String>,
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub userland_proxy_path: Option<String>,
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutdown_timeout: Option<i64>,
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_download_attempts: Option<u32>,
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_control_plane_mtu: Option<u32>,
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_rt_period: Option<i64>,
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_rt_runtime: Option<i64>,
    #[arg(long = "allow-nondistributable-artifacts", hide = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow_nondistributable_artifacts: Vec<String>,
    #[arg(long = "authorization-plugin", hide = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub authorization_plugins: Vec<String>,
    #[arg(long = "exec-opt", hide = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exec_opts: Vec<String>,
    #[arg(long = "storage-opt", hide = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub storage_opts: Vec<String>,
}

/// The same as a file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct ConfigFile {
    pub(super) hosts: Vec<String>,
    pub(super) data_root: Option<PathBuf>,
    pub(super) exec_root: Option<PathBuf>,
    pub(super) pidfile: Option<PathBuf>,
    pub(super) log_level: Option<String>,
    pub(super) log_format: Option<String>,
    pub(super) debug: bool,
    pub(super) group: Option<String>,
    pub(super) registry_mirrors: Vec<String>,
    pub(super) insecure_registries: Vec<String>,
    pub(super) proxies: ProxiesJson,
    pub(super) max_concurrent_downloads: Option<usize>,
    pub(super) max_concurrent_uploads: Option<usize>,
    pub(super) default_address_pools: Vec<PoolJson>,
    pub(super) bip: Option<String>,
    pub(super) fixed_cidr: Option<String>,
    pub(super) ipv6: Option<bool>,
    pub(super) fixed_cidr_v6: Option<String>,
    pub(super) mtu: Option<u32>,
    pub(super) ip: Option<String>,
    pub(super) userland_proxy: Option<bool>,
    pub(super) default_network_opts: BTreeMap<String, BTreeMap<String, String>>,
    pub(super) host_gateway_ip: Option<String>,
    pub(super) host_gateway_ips: Vec<String>,
    pub(super) dns: Vec<String>,
    pub(super) dns_opts: Vec<String>,
    pub(super) dns_search: Vec<String>,
    pub(super) default_ulimits: BTreeMap<String, UlimitJson>,
    pub(super) default_shm_size: Option<SizeJson>,
    pub(super) default_ipc_mode: Option<String>,
    pub(super) default_cgroupns_mode: Option<String>,
    pub(super) init: Option<bool>,
    pub(super) init_path: Option<PathBuf>,
    pub(super) cdi_spec_dirs: Option<Vec<String>>,
    pub(super) seccomp_profile: Option<PathBuf>,
    pub(super) swarm_default_advertise_addr: Option<String>,
    pub(super) labels: Vec<String>,
    pub(super) node_generic_resources: Vec<String>,
    pub(super) storage_driver: Option<String>,
    pub(super) live_restore: Option<bool>,
    pub(super) cgroup_parent: Option<String>,
    pub(super) no_new_privileges: Option<bool>,
    pub(super) userns_remap: Option<String>,
    pub(super) runtimes: BTreeMap<String, RuntimeJson>,
    pub(super) default_runtime: Option<String>,
    pub(super) icc: Option<bool>,
    pub(super) log_driver: Option<String>,
    pub(super) log_opts: BTreeMap<String, String>,
    pub(super) metrics_addr: Option<String>,
    pub(super) overlay_key_period: Option<String>,
    pub(super) raft_heartbeat: Option<String>,
    pub(super) data_path: Option<String>,
    pub(super) tlsverify: bool,
    pub(super) tlscacert: Option<PathBuf>,
    pub(super) tlscert: Option<PathBuf>,
    pub(super) tlskey: Option<PathBuf>,
    /// All else that is in it.
    #[serde(flatten)]
    pub(super) others: Map<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct ProxiesJson {
    pub(super) http_proxy: Option<String>,
    pub(super) https_proxy: Option<String>,
    pub(super) no_proxy: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub(super) struct UlimitJson {
    /// As the key says, too.
    #[serde(default)]
    pub(super) name: String,
    pub(super) hard: i64,
    pub(super) soft: i64,
}

/// Bytes, or as people write them.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum SizeJson {
    Bytes(u64),
    Text(String),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RuntimeJson {
    pub(super) path: PathBuf,
    #[serde(default)]
    pub(super) runtime_args: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct PoolJson {
    pub(super) base: String,
    pub(super) size: u8,
}
