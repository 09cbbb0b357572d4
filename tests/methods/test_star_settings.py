"""STaR's published schedule and defaults."""

from reasonrun.methods.star import STaR


def test_the_published_step_schedule():
    # floor(40 * 1.2 ** (n - 1)): 40, 48, 57.6, 69.12, 82.9, 99.5
    settings = STaR.Settings()
    assert [settings.steps(n) for n in range(1, 7)] == [40, 48, 57, 69, 82, 99]


def test_the_schedule_freezes():
    settings = STaR.Settings(steps_freeze_at=3)
    assert [settings.steps(n) for n in range(1, 6)] == [40, 48, 57, 57, 57]


def test_the_defaults_are_the_papers():
    settings = STaR.Settings()
    assert (settings.temperature, settings.num_samples, settings.rationalize, settings.init_from) == (
        0.0,
        1,
        True,
        "base",
    )
    assert (settings.sft.lr, settings.sft.warmup_steps, settings.sft.batch_size) == (1e-6, 100, 8)
    assert (settings.steps_start, settings.steps_growth, settings.data_window) == (40, 1.2, "last")
    assert not settings.carry_optimizer
