from rlhf_train.host import processor_name


def test_the_processor_s_name() -> None:
    assert processor_name("processor\t: 0\nmodel name\t: AMD EPYC 9654\nmodel name\t: other\n") == "AMD EPYC 9654"
    assert processor_name("Processor: ARM\n") == ""
