//! The default system-call filter: what is not named is refused with EPERM.
//!
//! The list is Docker's, with these differences: `socketcall` is refused as unknown, for its arguments
//! cannot be looked at and it would open the sockets that `socket` refuses. Programs of 32 bits then
//! make the calls that it stands for, which kernels have since 4.3.
//!
//! Compiling it takes libseccomp about 25 ms, more than all the rest of a container's start. So the
//! daemon compiles a [`Profile`] once, and shims load the finished program ([`Starter`](super::starter::Starter)).
//! That needs no privilege under no-new-privileges; for a container without it the filter has to be
//! on before the capabilities are gone, and libcontainer compiles it in its own place.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::disk;

const TABLE: &str = include_str!("syscalls.txt");

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;
/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
const CLONE_NAMESPACES: u64 = 0x7E02_0000;
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;
/// PER_LINUX, PER_LINUX32, UNAME26 with each, and "ask".
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xFFFF_FFFF];

/// What a system call's first argument must be.
#[derive(Clone, Copy, Debug)]
enum FirstArgument {
    Below(u64),
    Is(u64),
    Above(u64),
    /// None of these bits may be set.
    Without(u64),
}

/// What happens to some system calls.
#[derive(Clone, Debug)]
struct Rule {
    calls: BTreeSet<&'static str>,
    /// Allowed, or refused with this number.
    refused: Option<i32>,
    first: Option<FirstArgument>,
}

/// A filter, still in words.
#[derive(Clone, Debug)]
pub(crate) struct Profile(Vec<Rule>);

impl Profile {
    /// The default filter of a container with `capabilities`.
    pub(crate) fn new(capabilities: &BTreeSet<String>) -> Self {
        let mut allowed = BTreeSet::new();
        let mut open = true;
        for line in TABLE.lines().filter(|line| !line.starts_with('#')) {
            if let Some(capability) = line.strip_suffix(':') {
                open = capabilities.contains(capability);
            } else if open {
                allowed.extend(line.split_whitespace());
            }
        }
        let admin = allowed.contains("clone");
        let mut rules = vec![Rule { calls: allowed, refused: None, first: None }];
        let mut allow = |call: &'static str, first: FirstArgument| {
            rules.push(Rule { calls: [call].into(), refused: None, first: Some(first) });
        };
        // Allowed families: below AF_ALG, between it and AF_VSOCK, and above.
        allow("socket", FirstArgument::Below(AF_ALG));
        allow("socket", FirstArgument::Is(AF_ALG + 1));
        allow("socket", FirstArgument::Above(AF_VSOCK));
        for personality in PERSONALITIES {
            allow("personality", FirstArgument::Is(personality));
        }
        if !admin {
            allow("clone", FirstArgument::Without(CLONE_NAMESPACES));
            rules.push(Rule { calls: ["clone3"].into(), refused: Some(ENOSYS), first: None });
        }
        // Said in so many words, and last: libseccomp itself allows it where `socket` is allowed.
        rules.push(Rule { calls: ["socketcall"].into(), refused: Some(ENOSYS), first: None });
        Self(rules)
    }

    /// As OCI runtime-spec's `linux.seccomp`.
    pub(crate) fn to_oci(&self) -> Value {
        let rule = |rule: &Rule| {
            let mut value = match rule.refused {
                None => json!({"names": rule.calls, "action": "SCMP_ACT_ALLOW"}),
                Some(number) => json!({"names": rule.calls, "action": "SCMP_ACT_ERRNO", "errnoRet": number}),
            };
            if let Some(first) = rule.first {
                let (op, number, second) = match first {
                    FirstArgument::Below(limit) => ("SCMP_CMP_LT", limit, None),
                    FirstArgument::Is(number) => ("SCMP_CMP_EQ", number, None),
                    FirstArgument::Above(limit) => ("SCMP_CMP_GT", limit, None),
                    FirstArgument::Without(bits) => ("SCMP_CMP_MASKED_EQ", bits, Some(0)),
                };
                value["args"] = json!([{"index": 0, "value": number, "valueTwo": second, "op": op}]);
            }
            value
        };
        json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": EPERM,
            "architectures": architectures().iter().map(|(name, _)| name).collect::<Vec<_>>(),
            "syscalls": self.0.iter().map(rule).collect::<Vec<_>>(),
        })
    }

    /// As a program for the kernel.
    fn compile(&self) -> io::Result<Vec<u8>> {
        let mut context = ScmpFilterContext::new(ScmpAction::Errno(EPERM)).map_err(io::Error::other)?;
        for (_, architecture) in architectures() {
            context.add_arch(*architecture).map_err(io::Error::other)?;
        }
        for rule in &self.0 {
            let action = rule.refused.map_or(ScmpAction::Allow, ScmpAction::Errno);
            let compare = rule.first.map(|first| match first {
                FirstArgument::Below(limit) => ScmpArgCompare::new(0, ScmpCompareOp::Less, limit),
                FirstArgument::Is(number) => ScmpArgCompare::new(0, ScmpCompareOp::Equal, number),
                FirstArgument::Above(limit) => ScmpArgCompare::new(0, ScmpCompareOp::Greater, limit),
                FirstArgument::Without(bits) => ScmpArgCompare::new(0, ScmpCompareOp::MaskedEqual(bits), 0),
            });
            // A name that this libseccomp does not know stays refused, as all that is not named.
            for call in rule.calls.iter().filter_map(|name| ScmpSyscall::from_name(name).ok()) {
                context.add_rule_conditional(action, call, compare.as_slice()).map_err(io::Error::other)?;
            }
        }
        let mut file: File = nix::sys::memfd::memfd_create(c"filter", nix::sys::memfd::MFdFlags::empty())?.into();
        context.export_bpf(&file).map_err(io::Error::other)?;
        file.rewind()?;
        let mut program = Vec::new();
        file.read_to_end(&mut program)?;
        Ok(program)
    }

    /// The file that holds the program, compiled unless it is there already.
    pub(crate) fn ensure_compiled(&self, dir: &Path) -> io::Result<PathBuf> {
        let version = libseccomp::ScmpVersion::current().map_err(io::Error::other)?;
        let name = Sha256::digest(format!("{version:?} {}", self.to_oci()));
        let path = dir.join(format!("{}.bpf", hex::encode(name)));
        if !path.exists() {
            fs::create_dir_all(dir)?;
            disk::write_whole(&path, &self.compile()?)?;
        }
        Ok(path)
    }
}

/// A profile as dockerd takes it, as the runtime-spec has it: rules that depend on capabilities,
/// architectures or kernels are resolved for a container with the default capabilities on this host.
pub fn seccomp_profile(docker: &Value) -> Result<Value, String> {
    let default = docker["defaultAction"].as_str().ok_or("it has no defaultAction")?;
    let has = |list: &Value, wanted: &dyn Fn(&str) -> bool| {
        list.as_array().is_some_and(|list| list.iter().filter_map(Value::as_str).any(wanted))
    };
    let capability = |name: &str| super::spec::DEFAULT_CAPABILITIES.contains(&name);
    let architecture = |name: &str| name == crate::image::architecture();
    let is_said = |member: &str| docker[member].as_array().is_some_and(|list| !list.is_empty());
    if is_said("architectures") && is_said("archMap") {
        return Err("both 'architectures' and 'archMap' were specified in the seccomp profile, use either \
                    'architectures' or 'archMap'"
            .into());
    }
    let mut rules = Vec::new();
    for rule in docker["syscalls"].as_array().into_iter().flatten() {
        let (only, never) = (&rule["includes"], &rule["excludes"]);
        let listed = |list: &Value| list.as_array().is_some_and(|list| !list.is_empty());
        if (listed(&only["caps"]) && !has(&only["caps"], &capability))
            || (listed(&only["arches"]) && !has(&only["arches"], &architecture))
            || has(&never["caps"], &capability)
            || has(&never["arches"], &architecture)
        {
            continue;
        }
        let action = rule["action"].as_str().ok_or("a rule has no action")?;
        let names = match (rule["names"].as_array(), rule["name"].as_str()) {
            (Some(names), Some(name)) if !names.is_empty() && !name.is_empty() => {
                return Err(
                    "'name' and 'names' were specified in the seccomp profile, use either 'name' or 'names'".into()
                );
            }
            (Some(names), _) if !names.is_empty() => json!(names),
            (_, Some(name)) if !name.is_empty() => json!([name]),
            _ => return Err("a rule names no system call".into()),
        };
        let mut one = json!({"names": names, "action": action});
        for key in ["args", "errnoRet"] {
            if !rule[key].is_null() {
                one[key] = rule[key].clone();
            }
        }
        rules.push(one);
    }
    let mut profile = json!({
        "defaultAction": default,
        "architectures": architectures().iter().map(|(name, _)| name).collect::<Vec<_>>(),
        "syscalls": rules,
    });
    if let Some(number) = docker["defaultErrnoRet"].as_u64() {
        profile["defaultErrnoRet"] = json!(number);
    }
    Ok(profile)
}

fn architectures() -> &'static [(&'static str, ScmpArch)] {
    match std::env::consts::ARCH {
        "x86_64" => {
            &[("SCMP_ARCH_X86_64", ScmpArch::X8664), ("SCMP_ARCH_X86", ScmpArch::X86), ("SCMP_ARCH_X32", ScmpArch::X32)]
        }
        "aarch64" => &[("SCMP_ARCH_AARCH64", ScmpArch::Aarch64), ("SCMP_ARCH_ARM", ScmpArch::Arm)],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;

    fn names(capabilities: &[&str]) -> String {
        Profile::new(&capabilities.iter().map(|&c| c.to_owned()).collect()).to_oci().to_string()
    }

    #[test]
    fn dangerous_calls_are_absent_without_their_capability() {
        let plain = names(&["CAP_CHOWN"]);
        for call in ["\"mount\"", "\"bpf\"", "io_uring", "keyctl", "userfaultfd", "\"reboot\""] {
            assert!(!plain.contains(call), "{call}");
        }
        assert!(names(&["CAP_SYS_ADMIN"]).contains("\"mount\""));
        assert!(!names(&["CAP_SYS_ADMIN"]).contains("clone3\"],\"action\":\"SCMP_ACT_ERRNO"));
    }

    #[test]
    fn a_filter_is_compiled_once_for_all_with_the_same_capabilities() {
        let dir = tempfile::tempdir().unwrap();
        let profile = Profile::new(&BTreeSet::new());
        let path = profile.ensure_compiled(dir.path()).unwrap();
        let made = fs::metadata(&path).unwrap().modified().unwrap();
        assert_eq!(path, profile.ensure_compiled(dir.path()).unwrap());
        assert_eq!(made, fs::metadata(&path).unwrap().modified().unwrap());
        assert!(sys::Filter::parse(&fs::read(&path).unwrap()).is_some());
        let other = Profile::new(&["CAP_SYS_ADMIN".to_owned()].into()).ensure_compiled(dir.path()).unwrap();
        assert_ne!(path, other);
    }

    #[test]
    fn a_profile_of_docker_s_is_resolved_for_this_host() {
        let rule = |names: &str, more: &str| format!(r#"{{"names":["{names}"],"action":"SCMP_ACT_ALLOW"{more}}}"#);
        let rules = [
            rule("read", ""),
            rule("mount", r#","includes":{"caps":["CAP_SYS_ADMIN"]}"#),
            rule("chown", r#","includes":{"caps":["CAP_CHOWN"]}"#),
        ];
        let text = format!(r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{}]}}"#, rules.join(","));
        let profile = seccomp_profile(&serde_json::from_str(&text).unwrap()).unwrap().to_string();
        assert!(profile.contains("read") && profile.contains("chown") && !profile.contains("mount"), "{profile}");
        assert!(seccomp_profile(&json!({})).is_err());
    }

    #[test]
    fn a_damaged_filter_is_no_filter() {
        assert!(sys::Filter::parse(&[]).is_none());
        assert!(sys::Filter::parse(&[1; 9]).is_none());
    }
}
