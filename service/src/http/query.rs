//! Query parameters. One that does not parse is an error and never silently the default.

use salvo::Request;
use salvo_oapi::{BasicType, KnownFormat, Object, Operation, Parameter, ParameterIn, SchemaFormat};

use super::error::Error;

/// An optional number of the query. Text that is no number is 400. A number out of range is 422, which the endpoint
/// checks.
pub(super) fn query_number(req: &Request, name: &'static str) -> Result<Option<i64>, Error> {
    let Some(text) = query_text(req, name)? else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        Error::BadRequest(
            format!("the query parameter {name} must be a whole number, for example {name}=5").into(),
        )
    })
}

/// An optional parameter of the query. Two values would be ambiguous, so they are refused.
pub(super) fn query_text<'r>(req: &'r Request, name: &'static str) -> Result<Option<&'r str>, Error> {
    match req.queries().get_vec(name).map(Vec::as_slice) {
        None | Some([]) => Ok(None),
        Some([text]) => Ok(Some(text)),
        Some(_) => Err(Error::BadRequest(format!("the query parameter {name} is given twice").into())),
    }
}

/// The schema of a number of the query. Clients generated without the format would have 32 bits for a `seq`.
pub(super) fn query_integer(minimum: i64) -> Object {
    let format = SchemaFormat::KnownFormat(KnownFormat::Int64);
    Object::with_type(BasicType::Integer).format(format).minimum(minimum)
}

/// Describes a query parameter in the OpenAPI document.
pub(super) fn document_query(
    operation: &mut Operation,
    name: &str,
    required: bool,
    schema: Object,
    description: &str,
) {
    operation.parameters.insert(
        Parameter::new(name)
            .location(ParameterIn::Query)
            .required(required)
            .description(description)
            .schema(schema),
    );
}
