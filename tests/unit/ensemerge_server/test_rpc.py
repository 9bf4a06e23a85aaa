import pytest

from ensemerge import errors
from ensemerge_protos import inference_pb2
from ensemerge_server.rpc import Call, Code, Finish, at_once, expected, failing, status_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest("x"), Code.INVALID_ARGUMENT),
        (errors.NotFound("x"), Code.NOT_FOUND),
        (errors.QueueFull("x"), Code.UNAVAILABLE),
        (errors.ShuttingDown("x"), Code.UNAVAILABLE),
        (errors.DeadlineExceeded("x"), Code.DEADLINE_EXCEEDED),
        (errors.Cancelled("x"), Code.CANCELLED),
        (errors.PermissionDenied("x"), Code.PERMISSION_DENIED),
        (errors.Unsupported("x"), Code.UNIMPLEMENTED),
        (errors.ExecutionFailed("x"), Code.INTERNAL),
        (RuntimeError("x"), Code.INTERNAL),
    ],
)
def test_every_error_has_its_status(error: Exception, code: Code) -> None:
    assert status_of(error) is code


def test_an_error_that_nobody_foresaw_stays_in_the_log() -> None:
    known = errors.NotFound("x")
    assert expected(known) is known
    assert "secret" not in str(expected(RuntimeError("secret path")))


def test_an_answer_is_made_where_the_transport_wants_it() -> None:
    asked: list[str] = []

    def answer(message: inference_pb2.ModelReadyRequest) -> inference_pb2.ModelReadyResponse:
        asked.append(message.name)
        return inference_pb2.ModelReadyResponse(ready=True)

    finishes: list[Finish] = []
    method = at_once(inference_pb2.ModelReadyRequest, answer)
    method(inference_pb2.ModelReadyRequest(name="a").SerializeToString(), Call(), finishes.append)
    assert asked == []
    assert inference_pb2.ModelReadyResponse.FromString(finishes[0]()).ready
    assert asked == ["a"]


def test_a_failure_is_delivered_like_an_answer() -> None:
    with pytest.raises(errors.NotFound, match="gone"):
        failing(errors.NotFound("gone"))()
