//! What clients ask that go through a build by themselves, step by step: they have a frontend build, and say at the
//! end which of the things built it is.

use std::sync::Arc;

use skep_api::buildkit::frontend::llb_bridge_server::LlbBridge;
use skep_api::buildkit::frontend::result::Result as Outcome;
use skep_api::buildkit::frontend::{
    ApiCap, EvaluateRequest, EvaluateResponse, PingRequest, PongResponse, Ref, Result as Built, ReturnRequest,
    ReturnResponse, SolveRequest, SolveResponse, StatFileRequest, StatFileResponse,
};
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};

use super::Served;
use super::job::Job;

/// What of the gateway is served.
const CAPABILITIES: [&str; 6] =
    ["solve.base", "return", "returnmap", "proto.refarray", "gateway.evaluate", "gateway.solve.evaluate"];

impl Served {
    /// The build that a call belongs to.
    async fn job(&self, metadata: &MetadataMap) -> Result<Arc<Job>, Status> {
        let name = metadata.get("buildkit-controlapi-buildid").and_then(|name| name.to_str().ok());
        let name = name.ok_or_else(|| Status::invalid_argument("the call says of no build that it belongs to it"))?;
        self.kit().jobs.get(name).await
    }
}

#[tonic::async_trait]
impl LlbBridge for Served {
    async fn ping(&self, request: Request<PingRequest>) -> Result<Response<PongResponse>, Status> {
        self.job(request.metadata()).await?;
        let capability = |id: &&str| ApiCap { id: (*id).to_owned(), enabled: true };
        let frontend_caps = CAPABILITIES.iter().map(capability).collect();
        Ok(Response::new(PongResponse { frontend_caps, definition_caps: Vec::new(), workers: self.workers() }))
    }

    async fn solve(&self, request: Request<SolveRequest>) -> Result<Response<SolveResponse>, Status> {
        let job = self.job(request.metadata()).await?;
        let request = request.into_inner();
        if request.frontend.is_empty() || !request.frontend_inputs.is_empty() {
            return Err(Status::unimplemented(
                "this builder runs Dockerfiles, no steps in BuildKit's own form (LLB), which targets and files from \
                 other builds come in",
            ));
        }
        let id = self.solve_by(&job, &request.frontend, &request.frontend_opt).await?;
        let result = Built { result: Some(Outcome::Ref(Ref { id: id.clone() })), ..Built::default() };
        Ok(Response::new(SolveResponse { r#ref: id, result: Some(result) }))
    }

    async fn r#return(&self, request: Request<ReturnRequest>) -> Result<Response<ReturnResponse>, Status> {
        let job = self.job(request.metadata()).await?;
        let request = request.into_inner();
        let returned = match (request.error, request.result.and_then(|built| built.result)) {
            (Some(error), _) => Err(Status::new(Code::from(error.code), error.message)),
            (None, Some(Outcome::Ref(built))) => Ok(Some(built.id).filter(|id| !id.is_empty())),
            (None, Some(Outcome::Refs(built))) if built.refs.len() > 1 => {
                Err(Status::unimplemented("one image is built for one platform: build them one by one"))
            }
            (None, Some(Outcome::Refs(built))) => Ok(built.refs.into_values().next().map(|built| built.id)),
            (None, None) => Ok(None),
        };
        job.returned.send_replace(Some(returned));
        Ok(Response::new(ReturnResponse {}))
    }

    /// All that was built is there.
    async fn evaluate(&self, request: Request<EvaluateRequest>) -> Result<Response<EvaluateResponse>, Status> {
        self.job(request.metadata()).await?;
        Ok(Response::new(EvaluateResponse {}))
    }

    async fn stat_file(&self, request: Request<StatFileRequest>) -> Result<Response<StatFileResponse>, Status> {
        let path = request.into_inner().path;
        Err(Status::unimplemented(format!("{path}: what was built cannot be looked into: run the image")))
    }
}
