//! Making networks: the swarm's, and this host's own.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use axum::Json;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::container::Driver;
use skep_api::network::Ipam;
use skep_api::{NetworkSpec, Subnet, SubnetV6};
use skep_engine::{Ipv6Side, LocalNetworkSpec};
use skep_manager::control::Command;

use crate::http::json::{JsonBody, parse};
use crate::http::services::created;
use crate::http::{ApiError, State};

/// The driver whose networks stand on a link of the host's.
const MACVLAN: &str = "macvlan";

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct CreateBody {
    name: String,
    driver: String,
    scope: String,
    internal: bool,
    attachable: bool,
    ingress: bool,
    config_only: bool,
    config_from: Option<Value>,
    #[serde(rename = "IPAM")]
    ipam: IpamBody,
    #[serde(rename = "EnableIPv4")]
    enable_ipv4: Option<bool>,
    #[serde(rename = "EnableIPv6")]
    enable_ipv6: Option<bool>,
    options: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct IpamBody {
    driver: String,
    options: BTreeMap<String, String>,
    config: Vec<IpamConfigBody>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct IpamConfigBody {
    subnet: String,
    #[serde(rename = "IPRange")]
    ip_range: String,
    gateway: String,
    auxiliary_addresses: BTreeMap<String, String>,
    #[serde(rename = "AuxAddress")]
    aux_address: BTreeMap<String, String>,
}

impl IpamConfigBody {
    /// The addresses that no container is to get, by what they are for.
    fn reserved<A: std::str::FromStr>(&self, kind: &str) -> Result<BTreeMap<String, A>, ApiError> {
        let address = |(name, text): (&String, &String)| {
            let wrong = || ApiError::bad_request(format!("auxiliary address {name}={text:?} is no {kind} address"));
            Ok((name.clone(), text.parse().map_err(|_| wrong())?))
        };
        self.auxiliary_addresses.iter().chain(&self.aux_address).map(address).collect()
    }
}

/// What is said of a network's IPv6 side.
#[derive(Clone, Default)]
struct Ipv6Config {
    subnet: Option<SubnetV6>,
    subnet_as_written: Option<String>,
    gateway: Option<Ipv6Addr>,
    range: Option<SubnetV6>,
    reserved: BTreeMap<String, Ipv6Addr>,
}

impl CreateBody {
    fn spec(mut self) -> Result<NetworkSpec, ApiError> {
        if self.config_only || self.config_from.as_ref().is_some_and(|from| from["Network"].as_str() > Some("")) {
            return Err(ApiError::unsupported("networks that only hold a configuration are not supported"));
        }
        if !matches!(self.ipam.driver.as_str(), "" | "default") {
            return Err(ApiError::not_found(format!(
                "could not resolve IPAM driver {} in registry: leave it out, as addresses are given by skep itself",
                self.ipam.driver
            )));
        }
        let v6 = self.take_ipv6()?;
        let of_v6 = v6.clone().unwrap_or_default();
        if of_v6.range.is_some() || !of_v6.reserved.is_empty() {
            return Err(ApiError::unsupported(
                "ranges and reserved addresses of IPv6 are not supported in networks of a swarm: leave them out, as \
                 addresses follow from those of IPv4",
            ));
        }
        let mut configs = self.ipam.config.into_iter();
        let config = configs.next().unwrap_or_default();
        if configs.next().is_some() {
            return Err(ApiError::unsupported("more than one subnet for a network is not supported yet: name one"));
        }
        Ok(NetworkSpec {
            name: self.name,
            labels: self.labels,
            driver: Driver { name: self.driver, options: self.options },
            ipam: Ipam {
                driver: self.ipam.driver,
                options: self.ipam.options,
                subnet: read::<Subnet>(&config.subnet)?,
                range: read::<Subnet>(&config.ip_range)?,
                gateway: match config.gateway.as_str() {
                    "" => None,
                    text => Some(
                        text.parse()
                            .map_err(|_| ApiError::bad_request(format!("gateway {text:?} is no IPv4 address")))?,
                    ),
                },
                reserved: config.reserved("IPv4")?,
                subnet_v6: of_v6.subnet,
                gateway_v6: of_v6.gateway,
            },
            ipv6: self.enable_ipv6.unwrap_or_else(|| v6.is_some()),
            internal: self.internal,
            attachable: self.attachable,
            ingress: self.ingress,
        })
    }
}

impl CreateBody {
    fn local_spec(mut self) -> Result<LocalNetworkSpec, ApiError> {
        let on_parent = self.driver == MACVLAN;
        let ipv6_alone = self.enable_ipv4 == Some(false);
        let said = self.take_ipv6()?;
        if let Some(config) = self.ipam.config.iter().find(|config| ipv6_alone && !config.subnet.is_empty()) {
            let subnet = &config.subnet;
            return Err(ApiError::bad_request(format!(
                "subnet {subnet} is of IPv4, which is turned off: leave EnableIPv4 out, or the subnet"
            )));
        }
        let wanted = self.enable_ipv6.unwrap_or_else(|| said.is_some());
        let v6 = wanted.then(|| {
            let Ipv6Config { subnet, subnet_as_written, gateway, range, reserved } = said.unwrap_or_default();
            Ipv6Side {
                subnet_as_written,
                range,
                reserved,
                ..Ipv6Side::new(subnet.unwrap_or_else(SubnetV6::unique_local), gateway)
            }
        });
        let spec = self.spec()?;
        Ok(LocalNetworkSpec {
            on_parent,
            ipv6_alone,
            name: spec.name,
            labels: spec.labels,
            options: spec.driver.options,
            ipam_options: spec.ipam.options,
            attachable: spec.attachable,
            subnet: spec.ipam.subnet,
            range: spec.ipam.range,
            gateway: spec.ipam.gateway,
            reserved: spec.ipam.reserved,
            internal: spec.internal,
            v6,
        })
    }

    /// Takes out what is said of IPv6, which says that it is wanted, too.
    fn take_ipv6(&mut self) -> Result<Option<Ipv6Config>, ApiError> {
        let is_v6 = |config: &mut IpamConfigBody| config.subnet.contains(':') || config.gateway.contains(':');
        let mut configs = self.ipam.config.extract_if(.., is_v6);
        let (first, second) = (configs.next(), configs.next());
        drop(configs);
        let Some(config) = first else { return Ok(None) };
        if self.enable_ipv6 == Some(false) {
            let subnet = config.subnet;
            return Err(ApiError::bad_request(format!(
                "subnet {subnet} is of IPv6, which is turned off: leave EnableIPv6 out, or ask for it (--ipv6)"
            )));
        }
        if second.is_some() {
            return Err(ApiError::unsupported(
                "more than one IPv6 subnet for a network is not supported yet: name one",
            ));
        }
        Ok(Some(Ipv6Config {
            subnet: read(&config.subnet)?,
            gateway: read(&config.gateway)?,
            range: read(&config.ip_range)?,
            reserved: config.reserved("IPv6")?,
            subnet_as_written: Some(config.subnet).filter(|text| !text.is_empty()),
        }))
    }
}

fn read<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<Option<T>, ApiError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(ApiError::bad_request)
}

/// A name stands for one network, of this host or of the swarm: else none of both could be named for certain.
async fn refuse_known_name(state: &State, name: &str) -> Result<(), ApiError> {
    let of_swarm = match state.swarm.manager().await {
        Ok(manager) => manager.view().networks.by_name(name).is_some(),
        Err(_) => false,
    };
    if of_swarm || state.engine.networks().iter().any(|network| network.name == name) {
        return Err(ApiError::conflict(format!("network with name {name} already exists")));
    }
    Ok(())
}

pub(in crate::http) async fn create(state: State, body: JsonBody) -> Result<(StatusCode, Json<Value>), ApiError> {
    let body: CreateBody = parse(&body)?;
    if body.name.is_empty() {
        return Err(ApiError::bad_request("a network needs a name: give one in Name"));
    }
    if super::predefined_name(&body.name).is_some() {
        return Err(ApiError::forbidden(format!(
            "operation is not permitted on predefined {} network: choose another name",
            body.name
        )));
    }
    refuse_known_name(&state, &body.name).await?;
    if body.driver != "overlay" && body.scope != "swarm" && !body.ingress {
        if !matches!(body.driver.as_str(), "" | "bridge" | "default" | MACVLAN) {
            return Err(ApiError::not_found(format!(
                "could not resolve driver {} in registry: use bridge or macvlan, or overlay in a swarm; others are not \
                 supported yet",
                body.driver
            )));
        }
        let mut spec = body.local_spec()?;
        let driver = if spec.on_parent { MACVLAN } else { "bridge" };
        state.config.networks.complete(driver, &mut spec.options);
        let id = state.engine.create_network(spec)?;
        return Ok((StatusCode::CREATED, Json(json!({"Id": id, "Warning": ""}))));
    }
    if body.enable_ipv4 == Some(false) {
        return Err(ApiError::unsupported(
            "networks of IPv6 alone are not supported in a swarm: leave EnableIPv4 out, and ask for IPv6 beside (--ipv6)",
        ));
    }
    let mut spec = body.spec()?;
    state.config.networks.complete("overlay", &mut spec.driver.options);
    let outcome = state.swarm.manager().await?.execute(Command::CreateNetwork { spec }).await?;
    Ok((StatusCode::CREATED, Json(json!({"Id": created(outcome), "Warning": ""}))))
}
