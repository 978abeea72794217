//! Settings of dockerd's that have one value here: it is taken, any other is refused with the reason.

use super::args::{ConfigFile, DaemonArgs};

/// Tells of each that asks for something else.
pub(super) fn check(args: &DaemonArgs, file: &ConfigFile, problems: &mut Vec<String>) {
    let fixed = &args.fixed;
    for (name, asked, why) in [
        ("iptables", fixed.iptables.or(file.iptables), "published ports and the way out are rules of nftables"),
        ("ip6tables", fixed.ip6tables.or(file.ip6tables), "published ports are rules of nftables"),
        ("ip-forward", fixed.ip_forward.or(file.ip_forward), "containers are reached through the host's forwarding"),
        ("ip-masq", fixed.ip_masq.or(file.ip_masq), "make a network with enable_ip_masquerade=false instead"),
    ] {
        if asked == Some(false) {
            problems.push(format!("{name} cannot be switched off: {why}"));
        }
    }
    if fixed.selinux_enabled.or(file.selinux_enabled) == Some(true) {
        problems.push("selinux-enabled is not supported: leave it out".into());
    }
    let log_format = fixed.log_format.as_ref().or(file.log_format.as_ref());
    if log_format.is_some_and(|format| format != "text") {
        problems.push("log-format: the log is text".into());
    }
    for option in fixed.exec_opts.iter().chain(&file.exec_opts) {
        if option != "native.cgroupdriver=cgroupfs" {
            problems.push(format!(
                "exec-opt {option:?} is not supported: cgroups are made by native.cgroupdriver=cgroupfs"
            ));
        }
    }
    for (name, asked) in [
        ("storage-opts", fixed.storage_opts.iter().chain(&file.storage_opts).next()),
        ("authorization-plugins", fixed.authorization_plugins.iter().chain(&file.authorization_plugins).next()),
        ("node-generic-resources", fixed.node_generic_resources.iter().chain(&file.node_generic_resources).next()),
    ] {
        if let Some(asked) = asked {
            problems.push(format!("{name} ({asked}) are not supported: leave them out"));
        }
    }
    // Clients choose their builder by what the daemon answers, whatever stands here.
    if let Some((feature, _)) = file.features.iter().find(|(name, is_on)| *name != "buildkit" && **is_on) {
        problems.push(format!("feature {feature} is not supported: leave it out"));
    }
    if fixed.shutdown_timeout.or(file.shutdown_timeout).is_some_and(|seconds| seconds < -1) {
        problems.push("shutdown-timeout is no time: containers outlive the daemon, leave it out".into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_dockerd_are_taken_where_they_ask_for_what_is_the_case() {
        let check = |json: &str| {
            let mut problems = Vec::new();
            check(&DaemonArgs::default(), &serde_json::from_str(json).unwrap(), &mut problems);
            problems.join("; ")
        };
        let usual = r#"{"userland-proxy": false, "experimental": true, "raw-logs": true, "iptables": true,
            "features": {"buildkit": true}, "exec-opts": ["native.cgroupdriver=cgroupfs"], "shutdown-timeout": 15,
            "max-download-attempts": 5, "storage-opts": [], "selinux-enabled": false}"#;
        assert_eq!(check(usual), "");
        for (json, want) in [
            (r#"{"iptables": false}"#, "rules of nftables"),
            (r#"{"selinux-enabled": true}"#, "selinux-enabled is not supported"),
            (r#"{"exec-opts": ["native.cgroupdriver=systemd"]}"#, "native.cgroupdriver=systemd"),
            (r#"{"features": {"containerd-snapshotter": true}}"#, "containerd-snapshotter"),
            (r#"{"storage-opts": ["dm.basesize=10G"]}"#, "dm.basesize=10G"),
            (r#"{"log-format": "json"}"#, "the log is text"),
        ] {
            let told = check(json);
            assert!(told.contains(want), "{json}: {told}");
        }
    }
}
