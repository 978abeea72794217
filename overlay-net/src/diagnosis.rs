//! What is wrong with a node's networks, in words: findings from what is in force and from what the
//! tunnels say. It decides; [`Overlay::diagnose`](crate::Overlay::diagnose) gathers.

use std::collections::BTreeMap;

use skep_api::NodeId;
use skep_api::overlay::{Fact, FactKey, Peer};

use crate::path::PeerReport;
use crate::path::message::PeerIndex;

/// Handshakes are renewed every two minutes while anything passes, keep-alives included.
const HANDSHAKE_SECS_MAX: u64 = 240;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub subject: String,
    /// What is wrong and what to do; none if all is well.
    pub problem: Option<String>,
}

impl Finding {
    pub(crate) fn new(subject: impl Into<String>, problem: Option<String>) -> Self {
        Self { subject: subject.into(), problem }
    }
}

/// Compares what the tunnels say with what the managers do.
pub(crate) fn tunnels(own: NodeId, facts: &BTreeMap<FactKey, Fact>, reports: &[PeerReport]) -> Vec<Finding> {
    let peers = facts.values().filter_map(|fact| match fact {
        Fact::Peer(peer) if peer.node != own => Some(peer),
        _ => None,
    });
    let finding = |peer: &Peer| {
        let endpoint = &peer.endpoint;
        let problem = match reports.iter().find(|report| report.node == peer.node) {
            None => Some("there is none: its number or its address could not be used".to_owned()),
            Some(report) if peer.keys.first() != Some(&report.public_key) => {
                Some("it uses another key than the managers say: restart the daemon of this node".to_owned())
            }
            Some(report) => match report.handshake_secs {
                None => Some(format!("no handshake with {endpoint}: is its UDP port open between the two hosts?")),
                Some(secs) if secs > HANDSHAKE_SECS_MAX => {
                    Some(format!("the last handshake with {endpoint} was {secs} s ago: is the node up, the port open?"))
                }
                Some(_) => None,
            },
        };
        Finding::new(format!("tunnel to {} ({endpoint})", peer.hostname), problem)
    };
    peers.map(finding).collect()
}

/// Which way packets between containers take to the peers whose kernels have WireGuard, as this one's has.
pub(crate) fn in_kernel(
    facts: &BTreeMap<FactKey, Fact>,
    indexes: &BTreeMap<NodeId, PeerIndex>,
    reached: &BTreeMap<PeerIndex, bool>,
) -> Vec<Finding> {
    let finding = |fact: &Fact| {
        let Fact::Peer(Peer { node, hostname, kernel_port, .. }) = fact else { return None };
        let (port, reached) = (kernel_port.unwrap_or_default(), reached.get(indexes.get(node)?)?);
        Some(Finding::new(
            match reached {
                true => format!("packets to {hostname} pass through the kernel's WireGuard"),
                // Nothing is lost by it.
                false => format!("packets to {hostname} pass through the data path: UDP port {port} does not answer"),
            },
            None,
        ))
    };
    facts.values().filter_map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(key: u8, handshake_secs: Option<u64>, want: &str) {
        let node = NodeId::from_u128(2);
        let (keys, endpoint) = (vec![[1; 32]], "10.0.0.2:4789".into());
        let peer = Peer { node, hostname: "n2".into(), keys, endpoint, kernel_port: None };
        let facts = [(FactKey::Peer(node), Fact::Peer(peer))].into();
        let report = PeerReport {
            node,
            public_key: [key; 32],
            endpoint: "10.0.0.2:4789".parse().unwrap(),
            handshake_secs,
            sent_bytes: 0,
            received_bytes: 0,
        };
        let found = tunnels(NodeId::from_u128(1), &facts, &[report]);
        let problem = found[0].problem.clone().unwrap_or_else(|| "none".into());
        assert!(problem.contains(want), "{problem:?} should say {want:?}");
    }

    #[test]
    fn a_tunnel_s_trouble_is_named() {
        check(1, Some(5), "none");
        check(1, None, "no handshake");
        check(1, Some(500), "500 s ago");
        check(2, Some(5), "another key");
    }
}
