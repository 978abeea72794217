//! From a container's configuration to the OCI runtime spec.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::container::config::{
    BlockLimitKind, ContainerConfig, FileMount, MountSource, NamespaceMode, ResourceLimits,
};
use crate::container::devices;
use crate::container::id_map::Shift;
use crate::container::seccomp::Profile;
use crate::container::user::ResolvedUser;

/// The capabilities a container has unless told otherwise: Docker's fourteen.
pub(crate) const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// By the kernel's numbers, without `CAP_`.
const ALL_CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

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
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Whose terminals are, by convention.
pub(crate) const TERMINAL_GROUP: u32 = 5;

const CPU_PERIOD_MICROS: i64 = 100_000;

/// What the spec needs beside the configuration.
pub(crate) struct Place<'a> {
    pub(crate) rootfs: &'a Path,
    /// None: the host's.
    pub(crate) netns: Option<&'a Path>,
    pub(crate) cgroup: &'a Path,
    /// Host files shown as /etc/hosts, /etc/hostname, /etc/resolv.conf, and the asked-for payloads.
    pub(crate) files: &'a [FileMount],
    pub(crate) volumes: &'a BTreeMap<String, PathBuf>,
    pub(crate) user: &'a ResolvedUser,
    /// The AppArmor profile, loaded; none: it is not confined so.
    pub(crate) apparmor: Option<&'a str>,
    /// The first processes of the containers whose namespaces are shared, by their ids.
    pub(crate) peers: &'a BTreeMap<String, i32>,
    /// None: the host's.
    pub(crate) shift: Option<&'a Shift>,
}

/// The capabilities that `config` comes to.
pub(crate) fn capabilities(config: &ContainerConfig) -> BTreeSet<String> {
    let name = |text: &String| {
        let upper = text.to_ascii_uppercase();
        if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") }
    };
    if config.privileged {
        return all_capabilities();
    }
    let drop: BTreeSet<_> = config.cap_drop.iter().map(name).collect();
    let add: BTreeSet<_> = config.cap_add.iter().map(name).collect();
    let mut set: BTreeSet<String> = if add.contains("CAP_ALL") {
        all_capabilities()
    } else if drop.contains("CAP_ALL") {
        BTreeSet::new()
    } else {
        DEFAULT_CAPABILITIES.iter().map(|&c| c.to_owned()).collect()
    };
    set.retain(|capability| !drop.contains(capability));
    set.extend(add.into_iter().filter(|capability| capability != "CAP_ALL"));
    set
}

/// All capabilities that the daemon has to give.
pub(crate) fn all_capabilities() -> BTreeSet<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let own = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    let own = own.unwrap_or(0);
    let given = ALL_CAPABILITIES.iter().enumerate().filter(|(bit, _)| own & (1 << bit) != 0);
    given.map(|(_, name)| format!("CAP_{name}")).collect()
}

/// Builds `config.json`.
pub(crate) fn build(config: &ContainerConfig, place: &Place<'_>) -> Value {
    let capabilities = capabilities(config);
    let mut args = config.command();
    if config.init {
        args.splice(0..0, ["/sbin/skep-init".to_owned(), "init".to_owned(), "--".to_owned()]);
    }
    let cwd = if config.working_dir.is_empty() { "/" } else { &config.working_dir };
    json!({
        "ociVersion": "1.0.2",
        "hostname": (config.uts_mode != NamespaceMode::Host).then_some(&config.hostname),
        "domainname": (!config.domainname.is_empty()).then_some(&config.domainname),
        "root": {"path": place.rootfs, "readonly": config.read_only},
        "process": {
            "terminal": config.tty,
            "user": {"uid": place.user.uid, "gid": place.user.gid, "additionalGids": place.user.groups, "umask": 0o022},
            "args": args,
            "env": environment(config, place.user),
            "cwd": cwd,
            "capabilities": {
                "bounding": capabilities,
                "effective": if place.user.uid == 0 { json!(capabilities) } else { json!([]) },
                "permitted": if place.user.uid == 0 { json!(capabilities) } else { json!([]) },
                "inheritable": [],
                "ambient": [],
            },
            "rlimits": config.ulimits.iter().map(|limit| json!({
                "type": format!("RLIMIT_{}", limit.name.to_ascii_uppercase()),
                "soft": u64::try_from(limit.soft).unwrap_or(u64::MAX),
                "hard": u64::try_from(limit.hard).unwrap_or(u64::MAX),
            })).collect::<Vec<_>>(),
            // Said only if wanted: libcontainer takes any value here for "load the filter late", which
            // fails once the capabilities are gone.
            "noNewPrivileges": config.has_no_new_privileges().then_some(true),
            "oomScoreAdj": config.oom_score_adj,
            "apparmorProfile": place.apparmor,
        },
        "mounts": mounts(config, place),
        "linux": linux(config, place, &capabilities),
    })
}

fn environment(config: &ContainerConfig, user: &ResolvedUser) -> Vec<String> {
    let mut env: Vec<String> = config.env.iter().filter(|var| var.contains('=')).cloned().collect();
    let has = |env: &[String], name: &str| env.iter().any(|var| var.split('=').next() == Some(name));
    for (name, value) in [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOSTNAME", &config.hostname),
        ("HOME", &user.home),
        ("TERM", if config.tty { "xterm" } else { "" }),
    ] {
        if !value.is_empty() && !has(&env, name) {
            env.push(format!("{name}={value}"));
        }
    }
    env
}

/// Of /dev/shm, unless said otherwise.
const SHM_SIZE_BYTES: i64 = 64 << 20;

fn mounts(config: &ContainerConfig, place: &Place<'_>) -> Vec<Value> {
    let mut mounts = system_mounts(config, place);
    let mut own = config.mounts.clone();
    // Outer mounts first, so that none hides another.
    own.sort_by_key(|mount| mount.target.split('/').filter(|part| !part.is_empty()).count());
    for own in &own {
        let mut options = vec![if own.read_only { "ro".to_owned() } else { "rw".to_owned() }];
        let (kind, source) = match &own.source {
            MountSource::Bind { path, propagation } => {
                options.push("rbind".into());
                options.push(if propagation.is_empty() { "rprivate".into() } else { propagation.clone() });
                ("bind", path.clone())
            }
            MountSource::Volume { name, .. } => {
                options.push("rbind".into());
                ("bind", place.volumes[name].display().to_string())
            }
            MountSource::Tmpfs { size_bytes, mode, options: own } => {
                let usual =
                    ["nosuid", "nodev", "noexec"].into_iter().filter(|option| !own.contains(&option[2..].to_owned()));
                options.extend(usual.map(str::to_owned));
                options.extend(own.iter().cloned());
                options.extend(size_bytes.map(|size| format!("size={size}")));
                options.extend(mode.map(|mode| format!("mode={mode:o}")));
                ("tmpfs", "tmpfs".to_owned())
            }
        };
        mounts.push(json!({"destination": own.target, "type": kind, "source": source, "options": options}));
    }
    for file in place.files {
        let access = if file.read_only { "ro" } else { "rw" };
        mounts.push(json!({
            "destination": file.target, "type": "bind", "source": file.source,
            "options": ["bind", access, "rprivate", "nosuid", "nodev"],
        }));
    }
    mounts
}

/// What every container has mounted, but for what it mounts there itself.
fn system_mounts(config: &ContainerConfig, place: &Place<'_>) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": source, "options": options});
    let access = if config.privileged { "rw" } else { "ro" };
    let terminal_group = format!("gid={TERMINAL_GROUP}");
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", &terminal_group],
        ),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access]),
    ];
    let own_mount = |target: &str| config.mounts.iter().any(|mount| mount.target.trim_end_matches('/') == target);
    match &config.ipc_mode {
        NamespaceMode::Private => {
            let size = if config.shm_size_bytes > 0 { config.shm_size_bytes } else { SHM_SIZE_BYTES };
            mounts.push(mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]));
            if !own_mount("/dev/shm") {
                let size = format!("size={size}");
                let options = ["nosuid", "noexec", "nodev", "mode=1777", size.as_str()];
                mounts.push(mount("/dev/shm", "tmpfs", "shm", &options));
            }
        }
        NamespaceMode::Host => {
            mounts.push(mount("/dev/mqueue", "bind", "/dev/mqueue", &["rbind"]));
            mounts.push(mount("/dev/shm", "bind", "/dev/shm", &["rbind"]));
        }
        NamespaceMode::Container(id) => {
            let root = format!("/proc/{}/root", place.peers.get(id).copied().unwrap_or_default());
            mounts.push(mount("/dev/mqueue", "bind", &format!("{root}/dev/mqueue"), &["rbind"]));
            mounts.push(mount("/dev/shm", "bind", &format!("{root}/dev/shm"), &["rbind"]));
        }
    }
    mounts.retain(|mount| !own_mount(mount["destination"].as_str().unwrap_or_default()));
    mounts
}

fn linux(config: &ContainerConfig, place: &Place<'_>, capabilities: &BTreeSet<String>) -> Value {
    let existing = |paths: Vec<String>| paths.into_iter().filter(|path| Path::new(path).exists()).collect::<Vec<_>>();
    let usual_masked = || MASKED.iter().map(|&path| path.to_owned()).chain(thermal_throttle_paths()).collect();
    let usual_read_only = || READ_ONLY.iter().map(|&path| path.to_owned()).collect();
    let (masked, read_only) = if config.privileged {
        (Vec::new(), Vec::new())
    } else {
        (
            existing(config.masked_paths.clone().unwrap_or_else(usual_masked)),
            existing([cgroup_mounts(), config.read_only_paths.clone().unwrap_or_else(usual_read_only)].concat()),
        )
    };
    let mut linux = json!({
        "cgroupsPath": place.cgroup,
        "namespaces": namespaces(config, place),
        "maskedPaths": masked,
        "readonlyPaths": read_only,
        "sysctl": config.sysctls,
        "devices": devices::nodes(config),
        "resources": resources(config),
    });
    if let Some(shift) = place.shift {
        [linux["uidMappings"], linux["gidMappings"]] = shift.mappings();
    }
    if !config.seccomp_profile.is_null() && !config.privileged {
        linux["seccomp"] = config.seccomp_profile.clone();
        return linux;
    }
    if config.has_filter() && !config.has_compiled_filter() {
        linux["seccomp"] = Profile::new(capabilities).to_oci();
    }
    linux
}

fn namespaces(config: &ContainerConfig, place: &Place<'_>) -> Vec<Value> {
    let mut namespaces = vec![json!({"type": "mount"})];
    for (kind, file, mode) in [
        ("pid", "pid", &config.pid_mode),
        ("ipc", "ipc", &config.ipc_mode),
        ("uts", "uts", &config.uts_mode),
        ("cgroup", "cgroup", &config.cgroup_mode),
    ] {
        match mode {
            NamespaceMode::Private => namespaces.push(json!({"type": kind})),
            NamespaceMode::Host => {}
            NamespaceMode::Container(id) => {
                let pid = place.peers.get(id).copied().unwrap_or_default();
                namespaces.push(json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")}));
            }
        }
    }
    if let Some(shift) = place.shift {
        namespaces.push(json!({"type": "user", "path": shift.user_namespace()}));
    }
    if let Some(netns) = place.netns {
        namespaces.push(json!({"type": "network", "path": netns}));
    }
    namespaces
}

/// Where a container sees cgroups. Who can write its own lifts its limits and, by version 1, takes any
/// device: libcontainer mounts them writable, whatever it is told.
fn cgroup_mounts() -> Vec<String> {
    let root = Path::new("/sys/fs/cgroup");
    let mut mounts = vec![root.display().to_string()];
    if !root.join("cgroup.controllers").exists() {
        let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
        let hierarchies = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        mounts.extend(hierarchies.map(|entry| entry.path().display().to_string()));
    }
    mounts
}

/// Each CPU's throttling counters leak what others do.
fn thermal_throttle_paths() -> impl Iterator<Item = String> {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (0..cpus).map(|cpu| format!("/sys/devices/system/cpu/cpu{cpu}/thermal_throttle"))
}

fn resources(config: &ContainerConfig) -> Value {
    let mut resources = limits_of(config);
    resources["devices"] = devices::rules(config);
    resources
}

fn block_limits(limits: &ResourceLimits) -> Value {
    let mut block = json!({});
    if limits.blkio_weight > 0 {
        block["weight"] = json!(limits.blkio_weight);
    }
    for (kind, list, amount) in [
        (BlockLimitKind::Weight, "weightDevice", "weight"),
        (BlockLimitKind::ReadBytes, "throttleReadBpsDevice", "rate"),
        (BlockLimitKind::WriteBytes, "throttleWriteBpsDevice", "rate"),
        (BlockLimitKind::ReadOperations, "throttleReadIOPSDevice", "rate"),
        (BlockLimitKind::WriteOperations, "throttleWriteIOPSDevice", "rate"),
    ] {
        let of_kind = limits.block.iter().filter(|limit| limit.kind == kind);
        let devices: Vec<_> =
            of_kind.map(|limit| json!({"major": limit.major, "minor": limit.minor, amount: limit.amount})).collect();
        if !devices.is_empty() {
            block[list] = json!(devices);
        }
    }
    block
}

/// What may be changed while it runs.
pub(crate) fn limits_of(config: &ContainerConfig) -> Value {
    let limits = &config.limits;
    let mut cpu = json!({});
    if limits.nano_cpus > 0 {
        cpu = json!({"period": CPU_PERIOD_MICROS, "quota": limits.nano_cpus / (1_000_000_000 / CPU_PERIOD_MICROS)});
    }
    if limits.cpu_shares > 0 {
        cpu["shares"] = json!(limits.cpu_shares);
    }
    if limits.cpu_period_micros > 0 {
        cpu["period"] = json!(limits.cpu_period_micros);
    }
    if limits.cpu_quota_micros != 0 {
        cpu["quota"] = json!(limits.cpu_quota_micros);
    }
    for (key, set) in [("cpus", &limits.cpuset_cpus), ("mems", &limits.cpuset_mems)] {
        if !set.is_empty() {
            cpu[key] = json!(set);
        }
    }
    let mut memory = json!({});
    for (key, bytes) in [
        ("limit", limits.memory_bytes),
        ("reservation", limits.memory_reservation_bytes),
        ("swap", limits.memory_swap_bytes),
    ] {
        if bytes != 0 {
            memory[key] = json!(bytes);
        }
    }
    if let Some(swappiness) = limits.memory_swappiness {
        memory["swappiness"] = json!(swappiness);
    }
    if limits.oom_kill_disable {
        memory["disableOOMKiller"] = json!(true);
    }
    let mut resources = json!({"cpu": cpu, "memory": memory});
    if limits.pids > 0 {
        resources["pids"] = json!({"limit": limits.pids});
    }
    if limits.blkio_weight > 0 || !limits.block.is_empty() {
        resources["blockIO"] = block_limits(limits);
    }
    resources
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_added_and_dropped_by_either_name() {
        let config = |add: &[&str], drop: &[&str]| ContainerConfig {
            cap_add: add.iter().map(|&c| c.into()).collect(),
            cap_drop: drop.iter().map(|&c| c.into()).collect(),
            ..ContainerConfig::default()
        };
        assert_eq!(capabilities(&config(&[], &[])).len(), 14);
        assert_eq!(capabilities(&config(&["net_admin"], &["ALL"])), ["CAP_NET_ADMIN".to_owned()].into());
        assert!(!capabilities(&config(&[], &["CAP_CHOWN"])).contains("CAP_CHOWN"));
    }
}
