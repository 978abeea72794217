//! `skep inspect`: anything in full.

use serde_json::Value;

use super::container::Containers;
use crate::client::{Client, escape};
use crate::output::FormatArg;

#[derive(clap::Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    names: Containers,
    /// Count the bytes of a container's files, too
    #[arg(short, long)]
    size: bool,
    /// Look only among container, image, volume, network, service, task, node, secret, config
    #[arg(long = "type", value_name = "KIND")]
    kind: Option<String>,
    #[command(flatten)]
    format: FormatArg,
}

/// Where an object of each kind is found, in the order in which they are tried.
const KINDS: [(&str, &str, &str); 9] = [
    ("container", "/containers/", "/json"),
    ("image", "/images/", "/json"),
    ("volume", "/volumes/", ""),
    ("network", "/networks/", ""),
    ("service", "/services/", ""),
    ("task", "/tasks/", ""),
    ("node", "/nodes/", ""),
    ("secret", "/secrets/", ""),
    ("config", "/configs/", ""),
];

/// Shows objects of one kind, or of whatever kind has the name; `query` is what is asked besides.
pub(crate) async fn inspect(
    client: &Client,
    args: &InspectArgs,
    kind: Option<&str>,
    query: &str,
) -> anyhow::Result<()> {
    let kind = kind.or(args.kind.as_deref());
    let kinds: Vec<_> = KINDS.iter().filter(|(name, ..)| kind.is_none_or(|kind| kind == *name)).collect();
    let known = || KINDS.map(|(name, ..)| name).join(", ");
    anyhow::ensure!(!kinds.is_empty(), "type {:?} is not known: use {}", kind.unwrap_or_default(), known());
    let mut found = Vec::new();
    for name in &args.names.containers {
        found.push(find(client, &kinds, name, &format!("size={}{query}", args.size)).await?);
    }
    args.format.print_all(&found)
}

async fn find(client: &Client, kinds: &[&(&str, &str, &str)], name: &str, query: &str) -> anyhow::Result<Value> {
    let mut first = None;
    for (kind, before, after) in kinds {
        // An image's name has slashes that are no part of the path.
        let name = if *kind == "image" { name.to_owned() } else { escape(name) };
        match client.get(&format!("{before}{name}{after}?{query}")).await {
            Ok(value) => return Ok(value),
            Err(error) => drop(first.get_or_insert(error)),
        }
    }
    match (first, kinds) {
        (Some(error), [_]) => Err(error),
        _ => anyhow::bail!("nothing is called {name}: no container, image, volume, network or object of the swarm"),
    }
}
