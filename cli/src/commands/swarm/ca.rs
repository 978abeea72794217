//! The swarm's root certificate.

use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::client::Client;
use crate::commands::values::duration;
use crate::output::line;

const LOOK_EVERY: Duration = Duration::from_millis(200);

#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct CaArgs {
    /// Put another root certificate in the place of the one in force, and give every node a certificate of it
    #[arg(long)]
    rotate: bool,
    /// File with the root certificate to take (PEM); a new one is made without it
    #[arg(long, value_name = "FILE", requires_all = ["rotate", "ca_key"])]
    ca_cert: Option<String>,
    /// File with its key (PEM)
    #[arg(long, value_name = "FILE", requires_all = ["rotate", "ca_cert"])]
    ca_key: Option<String>,
    /// Life of node certificates, such as 2160h
    #[arg(long, value_name = "TIME", requires = "rotate")]
    cert_expiry: Option<String>,
    /// Return at once, and let it go on
    #[arg(short, long, requires = "rotate")]
    detach: bool,
    /// Do not show how it goes
    #[arg(short, long)]
    quiet: bool,
}

pub(super) async fn run(client: &Client, args: CaArgs) -> anyhow::Result<()> {
    let swarm = client.get("/swarm").await?;
    if !args.rotate {
        return show(&swarm);
    }
    let mut spec = swarm["Spec"].clone();
    let ca = &mut spec["CAConfig"];
    if let Some(text) = &args.cert_expiry {
        ca["NodeCertExpiry"] = json!(duration(text)?);
    }
    let read = |path: &String| std::fs::read_to_string(path).with_context(|| format!("{path} cannot be read"));
    ca["SigningCACert"] = json!(args.ca_cert.as_ref().map(read).transpose()?.unwrap_or_default());
    ca["SigningCAKey"] = json!(args.ca_key.as_ref().map(read).transpose()?.unwrap_or_default());
    if args.ca_cert.is_none() {
        ca["ForceRotate"] = json!(ca["ForceRotate"].as_u64().unwrap_or(0) + 1);
    }
    client.post(&format!("/swarm/update?version={}", swarm["Version"]["Index"]), &spec).await?;
    if args.detach {
        return Ok(());
    }
    wait(client, args.quiet).await?;
    show(&client.get("/swarm").await?)
}

fn show(swarm: &Value) -> anyhow::Result<()> {
    line(swarm["TLSInfo"]["TrustRoot"].as_str().unwrap_or_default().trim_end())
}

/// Waits until all nodes have certificates of the root that is to be, and trust it.
async fn wait(client: &Client, quiet: bool) -> anyhow::Result<()> {
    let bar = if quiet || !std::io::stderr().is_terminal() { ProgressBar::hidden() } else { ProgressBar::new(1) };
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} nodes {wide_msg}")?);
    let mut told = String::new();
    loop {
        let swarm = client.get("/swarm").await?;
        let nodes = client.get("/nodes").await?;
        let nodes = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
        let seen = Seen::new(&swarm, nodes);
        bar.set_length(nodes.len() as u64);
        bar.set_position((nodes.len() - seen.behind) as u64);
        bar.set_message(seen.trouble.clone());
        if !seen.trouble.is_empty() && seen.trouble != told && bar.is_hidden() && !quiet {
            eprintln!("{}", seen.trouble);
        }
        told = seen.trouble;
        if seen.behind == 0 && !seen.in_progress {
            bar.finish_and_clear();
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// How far a change of the root has come.
struct Seen {
    in_progress: bool,
    /// Nodes without a certificate of the root that is to be, or that do not trust it yet though it is in force.
    behind: usize,
    /// Whom it waits for that cannot do its part.
    trouble: String,
}

impl Seen {
    fn new(swarm: &Value, nodes: &[Value]) -> Self {
        let (wanted, in_progress) = (&swarm["TLSInfo"], swarm["RootRotationInProgress"] == true);
        let is_behind = |node: &&Value| {
            let own = &node["Description"]["TLSInfo"];
            own["CertIssuerPublicKey"] != wanted["CertIssuerPublicKey"]
                || (!in_progress && own["TrustRoot"] != wanted["TrustRoot"])
        };
        let behind: Vec<_> = nodes.iter().filter(is_behind).collect();
        let away = behind.iter().filter(|node| node["Status"]["State"] != "ready");
        let away: Vec<_> = away.filter_map(|node| node["Description"]["Hostname"].as_str()).collect();
        let trouble = match away.as_slice() {
            [] => String::new(),
            away => format!("waiting for {}, down: start it, or remove it ('node rm')", away.join(", ")),
        };
        Self { in_progress, behind: behind.len(), trouble }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_that_are_down_are_named_and_the_others_counted() {
        let swarm = |in_progress: bool| {
            let info = json!({"TrustRoot": "old", "CertIssuerPublicKey": "new"});
            json!({"RootRotationInProgress": in_progress, "TLSInfo": info})
        };
        let node = |name: &str, state: &str, key: &str, root: &str| {
            let tls = json!({"TrustRoot": root, "CertIssuerPublicKey": key});
            json!({"Description": {"Hostname": name, "TLSInfo": tls}, "Status": {"State": state}})
        };
        let nodes = [
            node("n1", "ready", "new", "old"),
            node("n2", "ready", "old", "old"),
            node("n3", "down", "old", "old"),
            node("n4", "ready", "new", "older"),
        ];
        let seen = Seen::new(&swarm(true), &nodes);
        assert_eq!((seen.behind, seen.in_progress), (2, true));
        assert_eq!(seen.trouble, "waiting for n3, down: start it, or remove it ('node rm')");
        assert_eq!(Seen::new(&swarm(false), &nodes).behind, 3);
    }
}
