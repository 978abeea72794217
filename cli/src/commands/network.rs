//! `skep network …`

use serde_json::{Value, json};

use super::prune::{self, PruneArgs};
use super::values::members;
use crate::client::{Client, escape, is_not_found};
use crate::output::{FormatArg, ListArgs, line};

#[derive(clap::Subcommand)]
pub(crate) enum NetworkCommand {
    /// Make a network that tasks on any node can share
    Create(CreateArgs),
    /// List the networks
    Ls {
        /// Show ids in full
        #[arg(long)]
        no_trunc: bool,
        #[command(flatten)]
        list: ListArgs,
    },
    /// Show networks in full
    Inspect {
        #[arg(required = true)]
        networks: Vec<String>,
        /// Show the services in them and their tasks, too
        #[arg(short, long)]
        verbose: bool,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Remove networks that nobody uses
    Rm {
        /// Say nothing of those that do not exist
        #[arg(short, long)]
        force: bool,
        #[arg(required = true)]
        networks: Vec<String>,
    },
    /// Give a single container a place in a network of this host's
    Connect {
        /// What its neighbours call it, too (repeatable)
        #[arg(long = "alias", value_name = "NAME")]
        aliases: Vec<String>,
        #[arg(long, value_name = "ADDRESS", default_value = "")]
        ip: String,
        #[arg(long, value_name = "ADDRESS", default_value = "")]
        ip6: String,
        /// Of 169.254.0.0/16, beside the other (repeatable)
        #[arg(long = "link-local-ip", value_name = "ADDRESS")]
        link_local: Vec<String>,
        /// CONTAINER[:ALIAS]: what it alone calls a neighbour there (repeatable)
        #[arg(long = "link", value_name = "CONTAINER[:ALIAS]")]
        links: Vec<String>,
        #[arg(long = "driver-opt", value_name = "NAME=VALUE")]
        driver_options: Vec<String>,
        /// What goes out goes through the network with the highest
        #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, allow_hyphen_values = true)]
        gw_priority: i64,
        network: String,
        container: String,
    },
    /// Take a single container out of a network of this host's
    Disconnect {
        /// It is no error if the container is not there
        #[arg(short, long)]
        force: bool,
        network: String,
        container: String,
    },
    /// Look for what is wrong with this node's networks, or with one network or service
    Diagnose { name: Option<String> },
    /// Remove every network that nobody uses
    Prune(PruneArgs),
}

#[derive(clap::Args)]
pub(crate) struct CreateArgs {
    /// Kind of network
    #[arg(short, long, default_value = "overlay")]
    driver: String,
    /// Its addresses, such as 10.5.0.0/24; picked from pools if absent. A second one may be of IPv6 (repeatable)
    #[arg(long = "subnet", value_name = "CIDR")]
    subnets: Vec<String>,
    /// Each of one of the subnets' (repeatable)
    #[arg(long = "gateway", value_name = "IP")]
    gateways: Vec<String>,
    /// The part of the subnet that tasks get addresses of
    #[arg(long, value_name = "CIDR")]
    ip_range: Option<String>,
    /// An address that is somebody else's: NAME=IP (repeatable)
    #[arg(long = "aux-address", value_name = "NAME=IP")]
    aux_addresses: Vec<String>,
    /// Option of the driver: encrypted[=false], com.docker.network.driver.mtu=BYTES (repeatable)
    #[arg(short, long = "opt", value_name = "NAME[=VALUE]")]
    options: Vec<String>,
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// Let single containers join it
    #[arg(long)]
    attachable: bool,
    /// Let nothing out of it
    #[arg(long)]
    internal: bool,
    /// Make it the network that published ports come in through
    #[arg(long)]
    ingress: bool,
    /// Give it IPv6 addresses, too; picked by chance if no subnet of theirs is named
    #[arg(long)]
    ipv6: bool,
    /// Give it IPv4 addresses, which it has unless this is false
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    ipv4: Option<bool>,
    /// Who hands addresses out: default
    #[arg(long, value_name = "DRIVER", default_value = "")]
    ipam_driver: String,
    #[arg(long = "ipam-opt", value_name = "NAME=VALUE")]
    ipam_options: Vec<String>,
    /// swarm or local, where the driver leaves it open
    #[arg(long, default_value = "")]
    scope: String,
    /// Not supported: the daemon says why
    #[arg(long)]
    config_only: bool,
    #[arg(long, value_name = "NETWORK")]
    config_from: Option<String>,
    name: String,
}

pub(crate) async fn run(client: &Client, command: NetworkCommand) -> anyhow::Result<()> {
    match command {
        NetworkCommand::Create(args) => {
            let created = client.post("/networks/create", &args.body()?).await?;
            line(created["Id"].as_str().unwrap_or_default())
        }
        NetworkCommand::Ls { no_trunc, list: args } => list(client, &args, no_trunc).await,
        NetworkCommand::Inspect { networks, verbose, format } => {
            let mut values = Vec::new();
            for network in networks {
                values.push(client.get(&format!("/networks/{}?verbose={verbose}", escape(&network))).await?);
            }
            format.print_all(&values)
        }
        NetworkCommand::Rm { force, networks } => {
            for network in networks {
                match client.delete(&format!("/networks/{}", escape(&network))).await {
                    Err(error) if force && is_not_found(&error) => {}
                    removed => {
                        removed?;
                        line(&network)?;
                    }
                }
            }
            Ok(())
        }
        NetworkCommand::Connect {
            aliases,
            ip,
            ip6,
            link_local,
            links,
            driver_options,
            gw_priority,
            network,
            container,
        } => {
            let ipam = json!({"IPv4Address": ip, "IPv6Address": ip6, "LinkLocalIPs": link_local});
            let endpoint = json!({
                "Aliases": aliases, "IPAMConfig": ipam, "Links": links, "DriverOpts": members(&driver_options),
                "GwPriority": gw_priority,
            });
            let body = json!({"Container": container, "EndpointConfig": endpoint});
            client.post(&format!("/networks/{}/connect", escape(&network)), &body).await.map(drop)
        }
        NetworkCommand::Disconnect { force, network, container } => {
            let body = json!({"Container": container, "Force": force});
            client.post(&format!("/networks/{}/disconnect", escape(&network)), &body).await.map(drop)
        }
        NetworkCommand::Diagnose { name } => diagnose(client, &name.unwrap_or_default()).await,
        NetworkCommand::Prune(args) => prune::run(client, prune::NETWORKS, &args).await,
    }
}

/// Tells every finding; fails if one is a problem, so that scripts notice.
async fn diagnose(client: &Client, name: &str) -> anyhow::Result<()> {
    let findings = client.get(&format!("/skep/diagnose?name={}", escape(name))).await?;
    let mut problems = 0;
    for finding in findings.as_array().into_iter().flatten() {
        let subject = finding["Subject"].as_str().unwrap_or_default();
        match finding["Problem"].as_str() {
            None => line(&format!("ok       {subject}"))?,
            Some(problem) => {
                problems += 1;
                line(&format!("problem  {subject}: {problem}"))?;
            }
        }
    }
    anyhow::ensure!(problems == 0, "{problems} found");
    Ok(())
}

impl CreateArgs {
    fn body(&self) -> anyhow::Result<Value> {
        let pairs = |list: &[String]| {
            let pair = |text: &String| {
                let (key, value) = text.split_once('=').unwrap_or((text, ""));
                (key.to_owned(), json!(value))
            };
            Value::Object(list.iter().map(pair).collect())
        };
        for text in &self.aux_addresses {
            anyhow::ensure!(text.contains('='), "aux-address {text:?} cannot be read: write NAME=IP");
        }
        let of_kind =
            |list: &[String], v6: bool| list.iter().filter(|text| text.contains(':') == v6).cloned().collect();
        let (mut subnets, mut gateways): (Vec<String>, Vec<String>) =
            (of_kind(&self.subnets, false), of_kind(&self.gateways, false));
        let first = json!({
            "Subnet": subnets.pop(), "Gateway": gateways.pop(), "IPRange": self.ip_range,
            "AuxiliaryAddresses": pairs(&self.aux_addresses),
        });
        anyhow::ensure!(subnets.is_empty() && gateways.is_empty(), "one IPv4 subnet and gateway can be named");
        let gateways: Vec<String> = of_kind(&self.gateways, true);
        let v6: Vec<String> = of_kind(&self.subnets, true);
        let second = v6.iter().enumerate().map(|(n, subnet)| json!({"Subnet": subnet, "Gateway": gateways.get(n)}));
        let configs: Vec<Value> = std::iter::once(first).chain(second).collect();
        let mut body = json!({
            "Name": self.name, "Driver": self.driver, "Attachable": self.attachable, "Internal": self.internal,
            "Ingress": self.ingress, "EnableIPv6": self.ipv6, "Options": pairs(&self.options),
            "Labels": pairs(&self.labels), "Scope": self.scope, "ConfigOnly": self.config_only,
            "IPAM": {"Driver": self.ipam_driver, "Options": pairs(&self.ipam_options), "Config": configs},
        });
        if let Some(ipv4) = self.ipv4 {
            body["EnableIPv4"] = json!(ipv4);
        }
        if let Some(from) = &self.config_from {
            body["ConfigFrom"] = json!({"Network": from});
        }
        Ok(body)
    }
}

async fn list(client: &Client, args: &ListArgs, no_trunc: bool) -> anyhow::Result<()> {
    let networks = client.get(&format!("/networks?{}", args.query()?)).await?;
    let row = |network: &Value| {
        let id = network["Id"].as_str().unwrap_or_default();
        json!({
            "ID": if no_trunc { id } else { &id[..id.len().min(12)] }, "Name": network["Name"], "Driver": network["Driver"],
            "Scope": network["Scope"], "Subnet": network["IPAM"]["Config"][0]["Subnet"],
        })
    };
    let mut rows: Vec<_> = networks.as_array().into_iter().flatten().map(row).collect();
    rows.sort_by_key(|row| row["Name"].as_str().unwrap_or_default().to_owned());
    let columns = [("ID", "ID"), ("Name", "NAME"), ("Driver", "DRIVER"), ("Scope", "SCOPE"), ("Subnet", "SUBNET")];
    args.print(&columns, &rows)
}
