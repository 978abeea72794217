//! From a container's configuration to the OCI runtime spec.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::container::config::{ContainerConfig, FileMount, MountSource};
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
}

/// The capabilities that `config` comes to.
pub(crate) fn capabilities(config: &ContainerConfig) -> BTreeSet<String> {
    let name = |text: &String| {
        let upper = text.to_ascii_uppercase();
        if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") }
    };
    let drop: BTreeSet<_> = config.cap_drop.iter().map(name).collect();
    let mut set: BTreeSet<String> = if drop.contains("CAP_ALL") {
        BTreeSet::new()
    } else {
        DEFAULT_CAPABILITIES.iter().map(|&c| c.to_owned()).filter(|c| !drop.contains(c)).collect()
    };
    set.extend(config.cap_add.iter().map(name));
    set
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
        "hostname": config.hostname,
        "root": {"path": place.rootfs, "readonly": config.read_only},
        "process": {
            "terminal": false,
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
        },
        "mounts": mounts(config, place),
        "linux": linux(config, place, &capabilities),
    })
}

fn environment(config: &ContainerConfig, user: &ResolvedUser) -> Vec<String> {
    let mut env = config.env.clone();
    let has = |env: &[String], name: &str| env.iter().any(|var| var.split('=').next() == Some(name));
    for (name, value) in [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOSTNAME", &config.hostname),
        ("HOME", &user.home),
    ] {
        if !has(&env, name) {
            env.push(format!("{name}={value}"));
        }
    }
    env
}

fn mounts(config: &ContainerConfig, place: &Place<'_>) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": source, "options": options});
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]),
    ];
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
            MountSource::Tmpfs { size_bytes, mode } => {
                options.extend(["nosuid".into(), "nodev".into(), "noexec".into()]);
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

fn linux(config: &ContainerConfig, place: &Place<'_>, capabilities: &BTreeSet<String>) -> Value {
    let masked: Vec<String> = MASKED
        .iter()
        .map(|&path| path.to_owned())
        .chain(thermal_throttle_paths())
        .filter(|path| Path::new(path).exists())
        .collect();
    let mut linux = json!({
        "cgroupsPath": place.cgroup,
        "namespaces": [
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
            {"type": "cgroup"},
        ],
        "maskedPaths": masked,
        "readonlyPaths": READ_ONLY.iter().filter(|path| Path::new(path).exists()).collect::<Vec<_>>(),
        "sysctl": config.sysctls,
        "resources": resources(config),
    });
    if let (Some(netns), Some(namespaces)) = (place.netns, linux["namespaces"].as_array_mut()) {
        namespaces.push(json!({"type": "network", "path": netns}));
    }
    if config.seccomp && !config.has_compiled_filter() {
        linux["seccomp"] = Profile::new(capabilities).to_oci();
    }
    linux
}

/// Each CPU's throttling counters leak what others do.
fn thermal_throttle_paths() -> impl Iterator<Item = String> {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (0..cpus).map(|cpu| format!("/sys/devices/system/cpu/cpu{cpu}/thermal_throttle"))
}

fn resources(config: &ContainerConfig) -> Value {
    let limits = &config.limits;
    let mut cpu = json!({});
    if limits.nano_cpus > 0 {
        cpu = json!({"period": CPU_PERIOD_MICROS, "quota": limits.nano_cpus / (1_000_000_000 / CPU_PERIOD_MICROS)});
    }
    if limits.cpu_shares > 0 {
        cpu["shares"] = json!(limits.cpu_shares);
    }
    let mut memory = json!({});
    if limits.memory_bytes > 0 {
        memory["limit"] = json!(limits.memory_bytes);
    }
    if limits.memory_reservation_bytes > 0 {
        memory["reservation"] = json!(limits.memory_reservation_bytes);
    }
    let mut resources = json!({"devices": devices(), "cpu": cpu, "memory": memory});
    if limits.pids > 0 {
        resources["pids"] = json!({"limit": limits.pids});
    }
    resources
}

/// No device but the harmless ones; any may be made (mknod), which opens nothing.
fn devices() -> Value {
    let mut rules = vec![json!({"allow": false, "access": "rwm"})];
    for kind in ["c", "b"] {
        rules.push(json!({"allow": true, "type": kind, "access": "m"}));
    }
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
        rules.push(json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"}));
    }
    rules.push(json!({"allow": true, "type": "c", "major": 136, "access": "rwm"}));
    json!(rules)
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
