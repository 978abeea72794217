//! What containers have that do not say.

use std::path::{Path, PathBuf};

use serde_json::Value;
use skep_api::container::Ulimit;
use skep_engine::{ContainerDefaults, parse_size};

use super::args::{ConfigFile, DaemonArgs, SizeJson};

/// As CDI has them: what hosts are set up with, and what is found out at their start.
const CDI_DIRS: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ContainerSettings {
    pub(crate) defaults: ContainerDefaults,
    /// Whether others may share their memory.
    pub(crate) shares_memory: bool,
    /// Whether they see the host's cgroups.
    pub(crate) sees_cgroups: bool,
    pub(crate) init_path: Option<PathBuf>,
    /// Where files name devices.
    pub(crate) cdi_dirs: Vec<PathBuf>,
}

impl ContainerSettings {
    pub(super) fn read(args: &DaemonArgs, file: &ConfigFile, problems: &mut Vec<String>) -> Self {
        let mut mode = |name: &str, asked: Option<&String>, known: [&str; 2]| match asked.map_or("", String::as_str) {
            "" => false,
            text if known.contains(&text) => text == known[1],
            text => {
                problems.push(format!("{name} {text:?} is unknown: use {} or {}", known[0], known[1]));
                false
            }
        };
        let ipc = args.default_ipc_mode.as_ref().or(file.default_ipc_mode.as_ref());
        let cgroupns = args.default_cgroupns_mode.as_ref().or(file.default_cgroupns_mode.as_ref());
        let shares_memory = mode("default-ipc-mode", ipc, ["private", "shareable"]);
        let sees_cgroups = mode("default-cgroupns-mode", cgroupns, ["private", "host"]);
        let init_path = args.init_path.clone().or_else(|| file.init_path.clone());
        if let Some(path) = init_path.as_ref().filter(|path| !path.is_absolute() || !path.is_file()) {
            problems.push(format!("init-path {} is no program: write its whole path", path.display()));
        }
        let profile = args.seccomp_profile.as_ref().or(file.seccomp_profile.as_ref());
        let lists = |flags: &[String], file: &[String]| [flags, file].concat();
        let dns = lists(&args.dns, &file.dns);
        if let Some(wrong) = dns.iter().find(|address| address.parse::<std::net::IpAddr>().is_err()) {
            problems.push(format!("dns {wrong:?} is no address"));
        }
        let defaults = ContainerDefaults {
            dns,
            dns_options: lists(&args.dns_opts, &file.dns_opts),
            dns_search: lists(&args.dns_search, &file.dns_search),
            ulimits: ulimits(args, file, problems),
            shm_size_bytes: shm_size(args, file, problems),
            // As dockerd calls its own.
            seccomp_profile: profile
                .filter(|path| path.as_os_str() != "builtin")
                .map_or(Value::Null, |path| seccomp(path, problems)),
            init: args.init.or(file.init).unwrap_or(false),
        };
        Self { defaults, shares_memory, sees_cgroups, init_path, cdi_dirs: cdi_dirs(args, file) }
    }
}

/// None if `features` say that there is no CDI, or if nothing or an empty name is all that is said.
fn cdi_dirs(args: &DaemonArgs, file: &ConfigFile) -> Vec<PathBuf> {
    if file.others.get("features").is_some_and(|features| features["cdi"] == false) {
        return Vec::new();
    }
    let said = if args.cdi_spec_dirs.is_empty() { file.cdi_spec_dirs.as_ref() } else { Some(&args.cdi_spec_dirs) };
    match said {
        None => CDI_DIRS.map(PathBuf::from).to_vec(),
        Some(dirs) => dirs.iter().filter(|dir| !dir.is_empty()).map(PathBuf::from).collect(),
    }
}

/// Reads `NAME=SOFT[:HARD]`.
pub(crate) fn ulimit(text: &str) -> Option<Ulimit> {
    let (name, limits) = text.split_once('=')?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    Some(Ulimit { name: name.to_owned(), soft: soft.parse().ok()?, hard: hard.parse().ok()? })
}

fn ulimits(args: &DaemonArgs, file: &ConfigFile, problems: &mut Vec<String>) -> Vec<Ulimit> {
    let of_file = file.default_ulimits.iter().map(|(name, limit)| {
        let name = if limit.name.is_empty() { name.clone() } else { limit.name.clone() };
        Ulimit { name, hard: limit.hard, soft: limit.soft }
    });
    let mut all: Vec<Ulimit> = of_file.collect();
    for text in &args.default_ulimits {
        match ulimit(text) {
            Some(limit) => all.push(limit),
            None => problems.push(format!("default-ulimit {text:?} cannot be read: write NAME=SOFT[:HARD]")),
        }
    }
    for limit in all.iter().filter(|limit| limit.hard != -1 && (limit.soft > limit.hard || limit.soft == -1)) {
        problems.push(format!("default-ulimit {}: its soft limit is above the hard one", limit.name));
    }
    all
}

fn shm_size(args: &DaemonArgs, file: &ConfigFile, problems: &mut Vec<String>) -> i64 {
    let size = match (&args.default_shm_size, &file.default_shm_size) {
        (Some(text), _) | (None, Some(SizeJson::Text(text))) => parse_size(text),
        (None, Some(SizeJson::Bytes(bytes))) => Some(*bytes),
        (None, None) => return 0,
    };
    size.and_then(|size| i64::try_from(size).ok()).unwrap_or_else(|| {
        problems.push("default-shm-size is no size: write one such as 64m".into());
        0
    })
}

/// The system-call filter in a file of docker's.
fn seccomp(path: &Path, problems: &mut Vec<String>) -> Value {
    let read = std::fs::read_to_string(path).map_err(|error| error.to_string());
    let read = read.and_then(|text| serde_json::from_str::<Value>(&text).map_err(|error| error.to_string()));
    let profile = read.and_then(|profile| skep_engine::seccomp_profile(&profile));
    profile.unwrap_or_else(|why| {
        problems.push(format!("seccomp-profile {} cannot be used: {why}", path.display()));
        Value::Null
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_containers_have_is_read_from_flags_and_file() {
        let file: ConfigFile = serde_json::from_str(
            r#"{"dns": ["10.0.0.2"], "dns-search": ["example"], "default-shm-size": "128M", "init": true,
                "default-ulimits": {"nofile": {"Name": "nofile", "Hard": 64000, "Soft": 100}},
                "default-cgroupns-mode": "host"}"#,
        )
        .unwrap();
        let args = DaemonArgs {
            default_ulimits: vec!["nproc=5:9".into()],
            default_ipc_mode: Some("shareable".into()),
            ..DaemonArgs::default()
        };
        let mut problems = Vec::new();
        let settings = ContainerSettings::read(&args, &file, &mut problems);
        assert_eq!(problems, Vec::<String>::new());
        let limits: Vec<_> = settings.defaults.ulimits.iter().map(|l| (l.name.as_str(), l.soft, l.hard)).collect();
        assert_eq!(limits, [("nofile", 100, 64000), ("nproc", 5, 9)]);
        assert_eq!(settings.defaults.shm_size_bytes, 128 << 20);
        assert!(settings.defaults.init && settings.shares_memory && settings.sees_cgroups);
    }

    #[test]
    fn files_that_name_devices_are_looked_for_where_it_is_said_or_nowhere() {
        let dirs = |flags: &[&str], file: &str| {
            let args =
                DaemonArgs { cdi_spec_dirs: flags.iter().map(|&dir| dir.into()).collect(), ..DaemonArgs::default() };
            cdi_dirs(&args, &serde_json::from_str(file).unwrap())
        };
        assert_eq!(dirs(&[], "{}"), CDI_DIRS.map(PathBuf::from));
        assert_eq!(dirs(&["/a"], r#"{"cdi-spec-dirs": ["/b"]}"#), [PathBuf::from("/a")]);
        assert_eq!(dirs(&[], r#"{"cdi-spec-dirs": ["/b"], "features": {"cdi": true}}"#), [PathBuf::from("/b")]);
        for none in
            [dirs(&[""], "{}"), dirs(&[], r#"{"cdi-spec-dirs": []}"#), dirs(&["/a"], r#"{"features": {"cdi": false}}"#)]
        {
            assert_eq!(none, Vec::<PathBuf>::new());
        }
    }

    #[test]
    fn what_containers_cannot_have_is_named() {
        let args = DaemonArgs {
            dns: vec!["nowhere".into()],
            default_ulimits: vec!["nofile".into(), "nproc=9:5".into()],
            default_shm_size: Some("much".into()),
            default_ipc_mode: Some("open".into()),
            init_path: Some("/no/such/init".into()),
            seccomp_profile: Some("/no/such/profile".into()),
            ..DaemonArgs::default()
        };
        let mut problems = Vec::new();
        ContainerSettings::read(&args, &ConfigFile::default(), &mut problems);
        let told = problems.join("; ");
        for part in
            ["nowhere", "\"nofile\"", "nproc: its soft", "default-shm-size", "\"open\"", "init-path", "seccomp-profile"]
        {
            assert!(told.contains(part), "{part}: {told}");
        }
    }
}
