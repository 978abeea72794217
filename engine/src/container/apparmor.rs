//! AppArmor: what containers are confined by where the host has it, unless they ask for another profile.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use super::config::ContainerConfig;

/// The profile of containers that ask for none.
const DEFAULT: &str = "skep-default";
/// What Docker calls its own, as Compose files and services have it.
const DEFAULT_OF_DOCKER: &str = "docker-default";
const UNCONFINED: &str = "unconfined";

/// What the kernel has loaded: lines `NAME (MODE)`.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";

/// Everything that a container's namespaces and capabilities leave to it, but for mounting, for writing where
/// the kernel shows itself, and for what is not the container's own.
const TEMPLATE: &str = r"
profile skep-default flags=(attach_disconnected,mediate_deleted) {
  network,
  unix,
  capability,
  file,
  umount,
  deny mount,

  signal (receive) peer=$daemon,
  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (send,receive) peer=skep-default,
  ptrace (trace,read,tracedby,readby) peer=skep-default,

  # All of /proc but processes, and of sysctls but those of shared memory.
  deny /proc/[^1-9]* wkl,
  deny /proc/[^1-9s]*/** wkl,
  deny /proc/s[^y]*/** wkl,
  deny /proc/sys[^/]*/** wkl,
  deny /proc/sys/[^k]** wkl,
  deny /proc/sys/kernel/[^s]** wkl,
  deny /proc/sys/kernel/s[^h]** wkl,
  deny /proc/sys/kernel/sh[^m]** wkl,
  deny /proc/{kcore,sysrq-trigger} rwklx,

  # All of /sys but cgroups.
  deny /sys/[^f]*/** wkl,
  deny /sys/f[^s]*/** wkl,
  deny /sys/fs/[^c]*/** wkl,
  deny /sys/fs/c[^g]*/** wkl,
  deny /sys/{firmware,kernel/security,devices/virtual/powercap}/** rwkl,
}
";

/// Whether the host can confine containers so: by its kernel, and the program that tells it profiles.
#[must_use]
pub fn has_apparmor() -> bool {
    is_enabled() && parser().is_some()
}

fn is_enabled() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y'))
        && Path::new(LOADED).exists()
}

fn parser() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|dir| dir.join("apparmor_parser")).find(|path| path.is_file())
}

impl ContainerConfig {
    /// The profile that the container has here; none where the host has none to give.
    #[must_use]
    pub fn apparmor_profile(&self) -> Option<&str> {
        match self.apparmor.as_str() {
            "" if self.privileged => has_apparmor().then_some(UNCONFINED),
            "" | DEFAULT | DEFAULT_OF_DOCKER => has_apparmor().then_some(DEFAULT),
            named => Some(named),
        }
    }
}

/// Says why a container cannot have the profile that it asks for, if it cannot.
pub fn check_apparmor(name: &str) -> Result<(), String> {
    let reason = match name {
        "" | UNCONFINED => return Ok(()),
        _ if !is_enabled() => "this host's kernel has no AppArmor",
        DEFAULT | DEFAULT_OF_DOCKER if parser().is_none() => "this host has no apparmor_parser",
        _ => return Ok(()),
    };
    Err(format!("AppArmor profile {name} cannot be had: {reason}; use apparmor=unconfined"))
}

/// Whether the host confines processes by SELinux, whose labels containers are not given.
#[must_use]
pub fn has_selinux() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

/// Has the profile of a container loaded, and names it; none if nothing is to be done.
pub(crate) fn ensure(config: &ContainerConfig) -> io::Result<Option<&str>> {
    let Some(name) = config.apparmor_profile().filter(|&name| name != UNCONFINED) else { return Ok(None) };
    if name == DEFAULT {
        ensure_default()?;
    } else if !is_loaded(name)? {
        return Err(io::Error::other(format!(
            "AppArmor profile {name} is not loaded on this host: load it with apparmor_parser"
        )));
    }
    Ok(Some(name))
}

fn is_loaded(name: &str) -> io::Result<bool> {
    let loaded = fs::read_to_string(LOADED)
        .map_err(|error| io::Error::new(error.kind(), format!("AppArmor's profiles, {LOADED}: {error}")))?;
    Ok(loaded.lines().any(|line| line.rsplit_once(" (").is_some_and(|(there, _)| there == name)))
}

/// Loads the default profile if it is not there, and once in any case: it may be another version's.
fn ensure_default() -> io::Result<()> {
    static IS_OURS: Mutex<bool> = Mutex::new(false);
    let mut is_ours = IS_OURS.lock().expect("nobody panics while holding it");
    if !*is_ours || !is_loaded(DEFAULT)? {
        load(&profile(&own_label()))?;
        *is_ours = true;
    }
    Ok(())
}

fn profile(daemon: &str) -> String {
    TEMPLATE.replace("$daemon", &format!("\"{daemon}\""))
}

/// What this process is confined by.
fn own_label() -> String {
    let text = fs::read_to_string("/proc/self/attr/current").unwrap_or_default();
    let label = text.trim_end_matches(['\n', '\0']);
    let label = label.rsplit_once(" (").map_or(label, |(label, _)| label);
    if label.is_empty() { UNCONFINED.to_owned() } else { label.to_owned() }
}

fn load(profile: &str) -> io::Result<()> {
    let program = parser().ok_or_else(|| io::Error::other("there is no apparmor_parser"))?;
    let fail = |what: String| io::Error::other(format!("the AppArmor profile {DEFAULT}: {what}"));
    let mut child = Command::new(&program)
        .args(["--replace", "--skip-cache", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| fail(format!("{}: {error}", program.display())))?;
    // Far less than a pipe holds.
    let told = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(profile.as_bytes()));
    let output = child.wait_with_output()?;
    if output.status.success() {
        return told;
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(fail(format!("{} ended with {}: {}", program.display(), output.status, said.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_the_profile_it_asks_for() {
        let named = |apparmor: &str, privileged| {
            let config = ContainerConfig { apparmor: apparmor.into(), privileged, ..ContainerConfig::default() };
            config.apparmor_profile().map(str::to_owned)
        };
        assert_eq!(check_apparmor(DEFAULT_OF_DOCKER).is_ok(), has_apparmor());
        let usual = has_apparmor().then(|| DEFAULT.to_owned());
        assert_eq!(named("", false), usual);
        assert_eq!(named(DEFAULT_OF_DOCKER, true), usual);
        assert_eq!(named("", true), has_apparmor().then(|| UNCONFINED.to_owned()));
        assert_eq!(named("mine", true).as_deref(), Some("mine"));
        assert_eq!(named("unconfined", false).as_deref(), Some("unconfined"));
        assert!(profile("me").contains("peer=\"me\",") && !profile("me").contains('$'));
        assert!(check_apparmor("").is_ok() && check_apparmor("unconfined").is_ok());
    }
}
