import pytest

from millrace.server.engine.tenants import Tenants


def test_service_is_counted_by_weight():
    tenants = Tenants()
    a, b = tenants.enter("a", 1.0, 1), tenants.enter("b", 2.0, 1)
    a.charge(10, 5)
    b.charge(10, 5)
    assert (a.counter, b.counter) == (20, 10)
    assert (tenants.share(a), tenants.share(b)) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_one_that_comes_back_is_lifted_to_the_least_and_never_lowered():
    tenants = Tenants()
    a, b, c = (tenants.enter(name, 1.0, 1) for name in "abc")
    a.charge(100, 0)
    b.charge(70, 0)
    c.charge(500, 0)
    for tenant in (b, c):
        tenants.leave(tenant)
    assert tenants.enter("b", 1.0, 1).counter == 100
    assert tenants.enter("c", 1.0, 1).counter == 500
    assert tenants.enter("new", 1.0, 1).counter == 100


def test_when_nobody_is_there_the_last_to_leave_is_the_measure():
    tenants = Tenants()
    a = tenants.enter("a", 1.0, 2)
    a.charge(0, 50)
    tenants.leave(a)
    tenants.leave(a)
    assert tenants.active == 0
    assert tenants.enter("b", 1.0, 1).counter == 100


def test_counters_of_idle_tenants_are_kept_up_to_a_bound():
    tenants = Tenants(most_idle=10)
    heavy, present = tenants.enter("heavy", 1.0, 1), tenants.enter("present", 1.0, 1)
    heavy.charge(10_000, 0)
    tenants.leave(heavy)
    for number in range(1000):
        tenants.leave(tenants.enter(f"passer-by {number}", 1.0, 1))
    assert len(tenants._known) <= 12
    assert tenants.enter("heavy", 1.0, 1) is heavy, "who had most is remembered longest"
    assert present.counter == 0
