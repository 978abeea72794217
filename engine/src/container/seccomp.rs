//! The default system-call filter: what is not named is refused with EPERM.
//!
//! The list is Docker's, with these differences: `socketcall` is refused, for its arguments cannot
//! be looked at and it would open the sockets that `socket` refuses.

use std::collections::BTreeSet;

use serde_json::{Value, json};

const TABLE: &str = include_str!("syscalls.txt");

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
const CLONE_NAMESPACES: u64 = 0x7E02_0000;
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;
/// PER_LINUX, PER_LINUX32, UNAME26 with each, and "ask".
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xFFFF_FFFF];

/// The filter, as OCI runtime-spec's `linux.seccomp`, for a container with `capabilities`.
pub(crate) fn default_profile(capabilities: &BTreeSet<String>) -> Value {
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
    let mut rules = vec![json!({"names": allowed, "action": "SCMP_ACT_ALLOW"})];
    let mut rule = |name: &str, args: Value| {
        rules.push(json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": args}));
    };
    // Allowed families: below AF_ALG, between it and AF_VSOCK, and above.
    rule("socket", json!([{"index": 0, "value": AF_ALG, "op": "SCMP_CMP_LT"}]));
    rule("socket", json!([{"index": 0, "value": AF_ALG + 1, "op": "SCMP_CMP_EQ"}]));
    rule("socket", json!([{"index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_GT"}]));
    for personality in PERSONALITIES {
        rule("personality", json!([{"index": 0, "value": personality, "op": "SCMP_CMP_EQ"}]));
    }
    if !admin {
        rule("clone", json!([{"index": 0, "value": CLONE_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]));
        rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}));
    }
    let architectures = match std::env::consts::ARCH {
        "x86_64" => json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
        "aarch64" => json!(["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]),
        _ => json!([]),
    };
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": architectures,
        "syscalls": rules,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(capabilities: &[&str]) -> String {
        default_profile(&capabilities.iter().map(|&c| c.to_owned()).collect()).to_string()
    }

    #[test]
    fn dangerous_calls_are_absent_without_their_capability() {
        let plain = names(&["CAP_CHOWN"]);
        for call in ["\"mount\"", "\"bpf\"", "io_uring", "keyctl", "userfaultfd", "socketcall", "\"reboot\""] {
            assert!(!plain.contains(call), "{call}");
        }
        assert!(names(&["CAP_SYS_ADMIN"]).contains("\"mount\""));
        assert!(!names(&["CAP_SYS_ADMIN"]).contains("clone3\"],\"action\":\"SCMP_ACT_ERRNO"));
    }
}
