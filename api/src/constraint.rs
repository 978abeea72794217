//! Placement constraints: `key==value` and `key!=value` over what is known of a node.

use std::str::FromStr;

use crate::node::Node;

/// Why a constraint cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseConstraintError {
    #[error("constraint {0:?} has no == or !=: write it as node.labels.zone==a")]
    NoOperator(String),
    #[error(
        "constraint {text:?}: {key:?} is not known; use node.id, node.hostname, node.ip, node.role, \
         node.platform.os, node.platform.arch, node.labels.KEY or engine.labels.KEY"
    )]
    UnknownKey { text: String, key: String },
    #[error("constraint {0:?} compares with nothing: put a value behind == or !=")]
    NoValue(String),
    #[error("constraint {text:?}: {value:?} is neither an address nor a network such as 10.0.0.0/24")]
    NotAnAddress { text: String, value: String },
}

/// A condition that a node meets or does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Constraint {
    key: Key,
    equal: bool,
    value: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    Id,
    Hostname,
    Ip,
    Role,
    Os,
    Arch,
    NodeLabel(String),
    EngineLabel(String),
}

impl Key {
    fn parse(text: &str) -> Option<Self> {
        let lower = text.to_ascii_lowercase();
        Some(match lower.as_str() {
            "node.id" => Self::Id,
            "node.hostname" => Self::Hostname,
            "node.ip" => Self::Ip,
            "node.role" => Self::Role,
            "node.platform.os" => Self::Os,
            "node.platform.arch" => Self::Arch,
            _ if lower.starts_with("node.labels.") => Self::NodeLabel(label(text, "node.labels.")?),
            _ if lower.starts_with("engine.labels.") => Self::EngineLabel(label(text, "engine.labels.")?),
            _ => return None,
        })
    }
}

/// A label's name keeps its case.
fn label(text: &str, prefix: &str) -> Option<String> {
    let name = &text[prefix.len()..];
    (!name.is_empty()).then(|| name.to_owned())
}

impl FromStr for Constraint {
    type Err = ParseConstraintError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (key, equal, value) = text
            .split_once("==")
            .map(|(key, value)| (key, true, value))
            .or_else(|| text.split_once("!=").map(|(key, value)| (key, false, value)))
            .ok_or_else(|| ParseConstraintError::NoOperator(text.to_owned()))?;
        let (key, value) = (key.trim(), value.trim());
        if value.is_empty() {
            return Err(ParseConstraintError::NoValue(text.to_owned()));
        }
        let parsed = Key::parse(key)
            .ok_or_else(|| ParseConstraintError::UnknownKey { text: text.to_owned(), key: key.to_owned() })?;
        if parsed == Key::Ip && network(value).is_none() {
            return Err(ParseConstraintError::NotAnAddress { text: text.to_owned(), value: value.to_owned() });
        }
        Ok(Self { key: parsed, equal, value: value.to_owned() })
    }
}

impl Constraint {
    /// Whether `node` meets the condition. Values compare without regard to case, as in Swarm.
    #[must_use]
    pub fn admits(&self, node: &Node) -> bool {
        let same = |actual: &str| actual.eq_ignore_ascii_case(&self.value);
        let matches = match &self.key {
            Key::Id => same(&node.id.to_string()),
            Key::Hostname => same(&node.description.hostname),
            Key::Ip => in_network(&node.status.addr, &self.value),
            Key::Role => same(node.role().as_str()),
            Key::Os => same(&node.description.platform.os),
            Key::Arch => same(&node.description.platform.architecture) || same(node.description.architecture_alias()),
            Key::NodeLabel(name) => node.spec.labels.get(name).is_some_and(|value| same(value)),
            Key::EngineLabel(name) => node.description.engine.labels.get(name).is_some_and(|value| same(value)),
        };
        matches == self.equal
    }
}

fn network(text: &str) -> Option<(std::net::IpAddr, u32)> {
    let (addr, prefix) = text.split_once('/').map_or((text, None), |(addr, prefix)| (addr, Some(prefix)));
    let addr: std::net::IpAddr = addr.parse().ok()?;
    let bits = if addr.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.map_or(Some(bits), |prefix| prefix.parse().ok().filter(|&p| p <= bits))?;
    Some((addr, prefix))
}

fn in_network(actual: &str, wanted: &str) -> bool {
    use std::net::IpAddr;
    let (Ok(actual), Some((base, prefix))) = (actual.parse::<IpAddr>(), network(wanted)) else { return false };
    let differ = match (actual, base) {
        (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(u32::from(a) ^ u32::from(b)) << 96,
        (IpAddr::V6(a), IpAddr::V6(b)) => u128::from(a) ^ u128::from(b),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
    };
    prefix == 0 || differ >> (128 - prefix) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::node;

    #[track_caller]
    fn check(constraint: &str, want: bool) {
        let mut node = node(7);
        node.description.hostname = "Alpha".into();
        node.status.addr = "10.1.2.3".into();
        node.spec.labels.insert("Zone".into(), "a".into());
        assert_eq!(constraint.parse::<Constraint>().unwrap().admits(&node), want, "{constraint}");
    }

    #[test]
    fn constraints_compare_what_they_name() {
        check("node.hostname==alpha", true);
        check("node.hostname!=alpha", false);
        check("node.labels.Zone == A", true);
        check("node.labels.zone==a", false);
        check("node.labels.none!=x", true);
        check("node.role==worker", true);
        check("node.platform.arch==amd64", true);
        check("node.platform.arch==x86_64", true);
        check("node.ip==10.1.0.0/16", true);
        check("node.ip==10.2.0.0/16", false);
        check("engine.labels.x==y", false);
    }

    #[test]
    fn unreadable_constraints_say_why() {
        for (text, why) in [
            ("node.role=worker", "no == or !="),
            ("zone==a", "not known"),
            ("node.role==", "nothing"),
            ("node.labels.==a", "not known"),
            ("node.ip==10.0.0.0/99", "neither"),
        ] {
            let error = text.parse::<Constraint>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
