//! Settings of dockerd's that have one value here: it is taken, any other is refused with the reason.

use serde_json::{Map, Value};

use super::args::{ConfigFile, DaemonArgs};

/// What a setting may be.
enum Fits {
    /// It changes nothing here.
    Anything,
    /// What can be left out as well.
    Only(&'static [&'static str]),
    NotTrue,
    NotFalse,
    /// Nothing.
    Empty,
}

/// Each with what it may be, and why.
const FIXED: [(&str, Fits, &str); 25] = [
    ("allow-nondistributable-artifacts", Fits::Anything, ""),
    ("authorization-plugins", Fits::Empty, "plugins are not supported"),
    ("bridge", Fits::Only(&["", "skep0"]), "the default bridge is skep0; bip says which addresses it has"),
    ("containerd", Fits::Empty, "there is none: containers are run by the daemon's own shims"),
    ("cpu-rt-period", Fits::Only(&["0"]), "real-time scheduling is not supported"),
    ("cpu-rt-runtime", Fits::Only(&["0"]), "real-time scheduling is not supported"),
    ("default-gateway", Fits::Empty, "it is the default bridge's address, which bip says"),
    ("default-gateway-v6", Fits::Empty, "it is the first address of fixed-cidr-v6"),
    ("exec-opts", Fits::Only(&["native.cgroupdriver=cgroupfs"]), "the daemon makes cgroups itself"),
    ("experimental", Fits::Anything, ""),
    ("features", Fits::Empty, "they are dockerd's"),
    ("firewall-backend", Fits::Only(&["nftables"]), "published ports and the way out are rules of nftables"),
    ("ip-forward", Fits::NotFalse, "containers are reached through the host's forwarding"),
    ("ip-forward-no-drop", Fits::Anything, ""),
    ("ip-masq", Fits::NotFalse, "make a network with enable_ip_masquerade=false instead"),
    ("ip6tables", Fits::NotFalse, "published ports are rules of nftables"),
    ("iptables", Fits::NotFalse, "published ports and the way out are rules of nftables"),
    ("max-download-attempts", Fits::Anything, ""),
    ("network-control-plane-mtu", Fits::Anything, ""),
    ("raw-logs", Fits::Anything, ""),
    ("selinux-enabled", Fits::NotTrue, "SELinux is not supported"),
    // Containers outlive the daemon.
    ("shutdown-timeout", Fits::Anything, ""),
    ("storage-opts", Fits::Empty, "storage drivers have no options"),
    (
        "tls",
        Fits::NotTrue,
        "without tlsverify anyone who reaches the port has this machine: set that, and leave tls out",
    ),
    ("userland-proxy-path", Fits::Anything, ""),
];

/// Tells of each that asks for something else, and of what there is no setting of that name for.
pub(super) fn check(args: &DaemonArgs, file: &ConfigFile, problems: &mut Vec<String>) {
    let flags: Map<String, Value> =
        serde_json::to_value(&args.fixed).ok().and_then(|given| given.as_object().cloned()).unwrap_or_default();
    let verifies = args.tlsverify.unwrap_or(file.tlsverify);
    for (name, value) in flags.iter().chain(&file.others) {
        let Some((_, fits, why)) = FIXED.iter().find(|(known, ..)| known == name) else {
            problems.push(format!("{name} is no setting: 'skep daemon --help' lists them"));
            continue;
        };
        // It goes without saying there.
        let is_said = name == "tls" && verifies;
        if !is_said && !fits.takes(value) {
            problems.push(format!("{name}: {} cannot be had: {why}", plain(value)));
        }
    }
}

/// As people write it.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

impl Fits {
    fn takes(&self, value: &Value) -> bool {
        match self {
            Self::Anything => true,
            Self::Only(known) => match value {
                Value::Array(all) => all.iter().all(|one| known.contains(&plain(one).as_str())),
                one => known.contains(&plain(one).as_str()),
            },
            Self::NotTrue => *value != Value::Bool(true),
            Self::NotFalse => *value != Value::Bool(false),
            Self::Empty => match value {
                Value::Null => true,
                Value::String(text) => text.is_empty(),
                Value::Array(all) => all.is_empty(),
                // Of features, clients choose their builder by what the daemon answers, whatever stands here.
                Value::Object(all) => all
                    .iter()
                    .all(|(name, on)| matches!(name.as_str(), "buildkit" | "cdi") || *on == Value::Bool(false)),
                Value::Bool(_) | Value::Number(_) => false,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(json: &str) -> String {
        let mut problems = Vec::new();
        check(&DaemonArgs::default(), &serde_json::from_str(json).unwrap(), &mut problems);
        problems.join("; ")
    }

    #[test]
    fn the_files_of_dockerd_are_taken_where_they_ask_for_what_is_the_case() {
        let usual = r#"{"experimental": true, "raw-logs": true, "iptables": true, "tls": true,
            "tlsverify": true, "features": {"buildkit": true, "cdi": true}, "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "shutdown-timeout": 15, "max-download-attempts": 5, "storage-opts": [], "selinux-enabled": false,
            "firewall-backend": "nftables", "bridge": "", "cpu-rt-period": 0}"#;
        assert_eq!(told(usual), "");
        for (json, want) in [
            (r#"{"iptables": false}"#, "iptables: false cannot be had: published ports"),
            (r#"{"selinux-enabled": true}"#, "SELinux is not supported"),
            (r#"{"exec-opts": ["native.cgroupdriver=systemd"]}"#, "native.cgroupdriver=systemd"),
            (r#"{"features": {"containerd-snapshotter": true}}"#, "containerd-snapshotter"),
            (r#"{"storage-opts": ["dm.basesize=10G"]}"#, "dm.basesize=10G"),
            (r#"{"bridge": "none"}"#, "bridge: none cannot be had"),
            (r#"{"tls": true}"#, "without tlsverify"),
            (r#"{"colour": "red"}"#, "colour is no setting"),
        ] {
            let problems = told(json);
            assert!(problems.contains(want), "{json}: {problems}");
        }
    }

    #[test]
    fn flags_are_held_to_the_same() {
        let mut args = DaemonArgs::default();
        args.fixed.iptables = Some(false);
        args.fixed.exec_opts = vec!["native.cgroupdriver=systemd".into()];
        let mut problems = Vec::new();
        check(&args, &ConfigFile::default(), &mut problems);
        assert_eq!(problems.len(), 2, "{problems:?}");
    }
}
