//! From a container's configuration to the OCI runtime spec.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::container::config::{
    BlockLimitKind, ContainerConfig, FileMount, MountSource, NamespaceMode, NetworkMode, ResourceLimits, SharedMemory,
};
use crate::container::devices;
use crate::container::id_map::Shift;
use crate::container::late_mounts;
use crate::container::seccomp::Profile;
use crate::container::shim::COMPLAINTS;
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

/// Whose terminals are, by convention.
pub(crate) const TERMINAL_GROUP: u32 = 5;

const CPU_PERIOD_MICROS: i64 = 100_000;

/// What the spec needs beside the configuration.
pub(crate) struct Place<'a> {
    pub(crate) rootfs: &'a Path,
    /// Where the spec itself lies.
    pub(crate) bundle: &'a Path,
    /// None: the host's.
    pub(crate) netns: Option<&'a Path>,
    pub(crate) cgroup: &'a Path,
    /// Host files shown as /etc/hosts, /etc/hostname, /etc/resolv.conf, and the asked-for payloads.
    pub(crate) files: &'a [FileMount],
    pub(crate) volumes: &'a BTreeMap<String, PathBuf>,
    /// Where images lie, and what shows only a part of one or of a volume, by target.
    pub(crate) parts: &'a BTreeMap<String, PathBuf>,
    pub(crate) user: &'a ResolvedUser,
    /// The AppArmor profile, loaded; none: it is not confined so.
    pub(crate) apparmor: Option<&'a str>,
    /// The memory that is shared with others, at /dev/shm; none: its own, the host's, or none at all.
    pub(crate) shared_memory: Option<&'a Path>,
    /// The first processes of the containers whose namespaces are shared, by their ids.
    pub(crate) peers: &'a BTreeMap<String, i32>,
    /// None: the host's.
    pub(crate) shift: Option<&'a Shift>,
    /// What an init is run by, before the command; nothing without one.
    pub(crate) init_words: &'a [&'a str],
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

/// Whether the kernel has a capability of this name, which is without `CAP_`.
#[must_use]
pub fn is_capability(name: &str) -> bool {
    ALL_CAPABILITIES.contains(&name)
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
    args.splice(0..0, place.init_words.iter().map(|&word| word.to_owned()));
    let cwd = if config.working_dir.is_empty() { "/" } else { &config.working_dir };
    let mut mounts = mounts(config, place);
    // Other runtimes know what to do.
    let late = if config.runtime.is_none() {
        late_mounts::take_hook(&mut mounts, place.rootfs, &place.bundle.join(COMPLAINTS))
    } else {
        None
    };
    json!({
        "ociVersion": "1.0.2",
        "hostname": (config.uts_mode != NamespaceMode::Host).then_some(&config.hostname),
        "domainname": (!config.domainname.is_empty()).then_some(&config.domainname),
        "annotations": config.annotations,
        "root": {"path": place.rootfs, "readonly": config.read_only},
        "process": {
            "terminal": config.tty,
            "consoleSize": config.terminal_size().map(console_size),
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
        "mounts": mounts,
        "hooks": late.map(|hook| json!({"createContainer": [hook]})),
        "linux": linux(config, place, &capabilities),
    })
}

/// A terminal's rows and columns, as the runtime-spec has them.
pub(crate) fn console_size([rows, columns]: [u16; 2]) -> Value {
    json!({"height": rows, "width": columns})
}

fn environment(config: &ContainerConfig, user: &ResolvedUser) -> Vec<String> {
    let mut env: Vec<String> = config.env.iter().filter(|var| var.contains('=')).cloned().collect();
    // A name alone takes the variable away.
    let said = |name: &str| config.env.iter().any(|var| var.split('=').next() == Some(name));
    for (name, value) in [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOSTNAME", &config.hostname),
        ("HOME", &user.home),
        ("TERM", if config.tty { "xterm" } else { "" }),
    ] {
        if !value.is_empty() && !said(name) {
            env.push(format!("{name}={value}"));
        }
    }
    env
}

fn mounts(config: &ContainerConfig, place: &Place<'_>) -> Vec<Value> {
    let mut mounts = system_mounts(config, place);
    let mut own = config.mounts.clone();
    // Outer mounts first, so that none hides another.
    own.sort_by_key(|mount| mount.target.split('/').filter(|part| !part.is_empty()).count());
    for own in &own {
        let mut options = vec![if own.read_only { "ro".to_owned() } else { "rw".to_owned() }];
        let (kind, source) = match &own.source {
            MountSource::Bind { path, propagation, alone, writable_below } => {
                // Others may be too old to know of it.
                if own.read_only && !writable_below && config.runtime.is_none() {
                    options.push("rro".into());
                }
                options.push(if *alone { "bind".into() } else { "rbind".into() });
                options.push(if propagation.is_empty() { "rprivate".into() } else { propagation.clone() });
                ("bind", path.clone())
            }
            MountSource::Volume { name, .. } => {
                options.push("rbind".into());
                let part = place.parts.get(&own.target);
                ("bind", part.unwrap_or_else(|| &place.volumes[name]).display().to_string())
            }
            MountSource::Image { .. } => {
                options.push("rbind".into());
                ("bind", place.parts.get(&own.target).map(|part| part.display().to_string()).unwrap_or_default())
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
    let is_own = |target: &str| own.iter().any(|mount| mount.target == target);
    for file in place.files.iter().filter(|file| !is_own(&file.target)) {
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
    if config.ipc_mode == NamespaceMode::Host {
        mounts.push(match Path::new("/dev/mqueue").exists() {
            true => mount("/dev/mqueue", "bind", "/dev/mqueue", &["rbind"]),
            // A host that has its queues mounted nowhere has them all the same.
            false => mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        });
        mounts.push(mount("/dev/shm", "bind", "/dev/shm", &["rbind"]));
    } else {
        // Of a namespace that is shared it shows the same queues.
        mounts.push(mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]));
        if let Some(shared) = place.shared_memory {
            mounts.push(mount(
                "/dev/shm",
                "bind",
                &shared.display().to_string(),
                &["rbind", "nosuid", "noexec", "nodev"],
            ));
        } else if config.shared_memory != SharedMemory::None {
            let size = format!("size={}", config.shm_size_bytes());
            mounts.push(mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &size]));
        }
    }
    mounts.retain(|mount| {
        let target = mount["destination"].as_str().unwrap_or_default();
        match own_mount("/dev") {
            // The built-in runtime makes its devices somewhere, though nobody sees them.
            true if matches!(target, "/dev" | "/dev/pts") => config.runtime.is_none(),
            true if target.starts_with("/dev/") => false,
            _ => !own_mount(target),
        }
    });
    mounts
}

fn linux(config: &ContainerConfig, place: &Place<'_>, capabilities: &BTreeSet<String>) -> Value {
    let existing = |paths: Vec<String>| paths.into_iter().filter(|path| Path::new(path).exists()).collect::<Vec<_>>();
    let masked = existing(config.masked_paths().unwrap_or_default());
    let read_only = config.read_only_paths().map(|paths| existing([cgroup_mounts(), paths].concat()));
    let mut linux = json!({
        "cgroupsPath": place.cgroup,
        "namespaces": namespaces(config, place),
        "maskedPaths": masked,
        "readonlyPaths": read_only.unwrap_or_default(),
        "sysctl": sysctls(config, place),
        "devices": devices::nodes(config),
        "resources": resources(config),
    });
    if let Some(propagation) = root_propagation(config) {
        linux["rootfsPropagation"] = json!(propagation);
    }
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

/// The kernel's settings: whoever has a network to himself may serve any port there and ping, unless he says otherwise.
fn sysctls(config: &ContainerConfig, place: &Place<'_>) -> BTreeMap<String, String> {
    let mut all = config.sysctls.clone();
    if place.netns.is_none() || matches!(config.network, NetworkMode::Container(_)) {
        return all;
    }
    let mut usual = vec![("net.ipv4.ip_unprivileged_port_start", "0")];
    if place.shift.is_none() {
        // A group that nobody is mapped to cannot be named.
        usual.push(("net.ipv4.ping_group_range", "0 2147483647"));
    }
    for (name, value) in usual {
        if Path::new("/proc/sys").join(name.replace('.', "/")).exists() {
            all.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
    }
    all
}

/// How mounts come and go between the host and the container, so that those that are to can: most are on their own.
fn root_propagation(config: &ContainerConfig) -> Option<&'static str> {
    let has = |wanted: &str| {
        config.mounts.iter().any(|mount| {
            matches!(&mount.source, MountSource::Bind { propagation, .. } if propagation.trim_start_matches('r') == wanted)
        })
    };
    if has("shared") {
        Some("shared")
    } else if has("slave") {
        Some("slave")
    } else {
        None
    }
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
